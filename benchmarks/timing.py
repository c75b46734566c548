"""Times of a call inside CUDA graphs: what it costs on the GPU when the host is out of the way.

warm      a graph of many calls with the same inputs; small inputs are in L2
cold      a graph of pairs, first a kernel that writes more than L2 holds, then the call; the time of the same graph
          without the calls is subtracted. The two graphs take turns, so that both see the same clocks.
streamed  a graph of calls one behind the other, each with arguments of its own, which together are several times what
          L2 holds: what a call costs in a decode step

All are medians over replays, timed by events on the stream: fewer of graphs that take long.

A cold call of a product of few tokens takes longer than a streamed one, though both read all of their weights from
memory. The flush leaves L2 full of lines that have to be written back while the call reads, and the call cannot load
weights before the flush has ended, as it does behind another product by programmatic dependent launch. Cold is kept
because the peers' kernels were timed with L2 flushed before each call and the flush's own time subtracted.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]

REPLAY_US = 1000  # how long a replay of warm calls should take at least
MOST_CALLS = 200  # of one graph
LEAST_CALLS = 4
PAIRS = 10  # cold calls of one graph
MOST_US = 1_000_000  # that all replays of a graph may take together
LEAST_REPLAYS = 5
FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Times:
    """us of one call."""

    warm: float
    cold: float
    calls: int  # of a warm replay
    streamed: float | None = None  # None: not timed


class Timer:
    """Times calls on the current GPU. `replays` of each graph; holds the buffer that flushes L2."""

    def __init__(self, replays: int):
        self.replays = replays
        self._buffer = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        self._flushes = captured([self._flush] * PAIRS)

    def times(self, call: Call) -> Times:
        warm, calls = self.warm(call)
        return Times(warm, self.cold(call), calls)

    def warm(self, call: Call) -> tuple[float, int]:
        """us of a call, and how many calls a graph had."""
        few = replay_us(captured([call] * LEAST_CALLS), 3) / LEAST_CALLS
        calls = max(LEAST_CALLS, min(MOST_CALLS, round(REPLAY_US / few)))
        return replay_us(captured([call] * calls), self.affordable(few * calls)) / calls, calls

    def cold(self, call: Call) -> float:
        pairs = captured([self._flush, call] * PAIRS)
        return paired_us(pairs, self._flushes, self.affordable(replay_us(pairs, 1))) / PAIRS

    def streamed(self, calls: list[Call]) -> float:
        """us of one of the calls, each of which reads data of its own, when they follow each other again and again."""
        graph = captured(calls)
        rounds = max(1, round(REPLAY_US / replay_us(graph, 3)))
        if rounds > 1:
            graph = captured(calls * rounds)
        each = rounds * len(calls)
        return replay_us(graph, self.affordable(replay_us(graph, 1))) / each

    def affordable(self, us: float) -> int:
        """How many replays of `us` each."""
        return max(min(LEAST_REPLAYS, self.replays), min(self.replays, int(MOST_US / us)))

    def _flush(self) -> None:
        self._buffer.fill_(1)  # by a kernel; a memset of zeros might not pass through L2


def captured(calls: list[Call]) -> torch.cuda.CUDAGraph:
    """A graph of the calls, each of which ran before, outside of it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in dict.fromkeys(calls):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()  # the first replay uploads the graph
    torch.cuda.synchronize()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Median over replays."""
    return statistics.median(_each_us([graph] * replays))


def paired_us(graph: torch.cuda.CUDAGraph, without: torch.cuda.CUDAGraph, replays: int) -> float:
    """Median of the differences of replays that take turns."""
    times = _each_us([graph, without] * replays)
    return statistics.median(more - less for more, less in zip(times[::2], times[1::2], strict=True))


def _each_us(graphs: list[torch.cuda.CUDAGraph]) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(graphs) + 1)]
    for graph, event in zip(graphs, events, strict=False):
        event.record()
        graph.replay()
    events[-1].record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in zip(events[:-1], events[1:], strict=True)]
