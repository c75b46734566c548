"""A decode step as one CUDA graph, and its tokens on the host one step late.

    graph = DecodeGraph(step, ring, buckets)    warm up, capture one graph for every batch bucket
    graph.start(index)                          the next step writes row `index` of the ring
    graph.step(rows)                            replay; returns at once
    graph.tokens(index)                         what step `index` sampled: waits for that step, not for later ones

Nothing inside a step goes through the host. The step writes its tokens into a ring on the device; a second
stream copies each row of it into pinned memory while the next step runs. All graphs share one memory pool: no two run
at the same time. Weights and state keep their addresses, so both may be rewritten between replays (weights with a
synchronisation after it: kernels read them before they wait for the work in front of them).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

WARM_UP_STEPS = 3  # compilation, library handles and workspaces, the allocator's blocks


def batch_buckets(max_batch: int) -> tuple[int, ...]:
    """Batch sizes that get a graph of their own: powers of two, and max_batch."""
    return tuple(sorted({*(1 << bit for bit in range(max_batch.bit_length()) if 1 << bit < max_batch), max_batch}))


class DecodeGraph:
    """Graphs of `step(rows)` for some numbers of rows.

    step      runs one decode step of the first `rows` sequences on static buffers. It must not read anything back to
              the host; where no sequence is active it may change nothing but what the caller puts back.
    ring      [R, B] int64 on the device: step number i writes its tokens into row i % R
    buckets   numbers of rows to capture; `step(rows)` replays the smallest that is large enough
    progress  show a bar on stderr: the first step may compile for minutes
    Raises torch's capture error if a step does something that a graph cannot hold, a host read for example.
    """

    def __init__(self, step: Callable[[int], Tensor], ring: Tensor, buckets: Sequence[int], *, progress: bool = False):
        if ring.device.type != "cuda":
            raise ValueError(f"a CUDA graph needs its buffers on a GPU, got a ring on {ring.device}")
        self.buckets = tuple(sorted(buckets))
        self._ring, self._slots = ring, ring.shape[0]
        self._host = torch.empty(ring.shape, dtype=ring.dtype, pin_memory=True)
        self._finished = [torch.cuda.Event() for _ in range(self._slots)]
        self._arrived = [torch.cuda.Event() for _ in range(self._slots)]
        self._copies = torch.cuda.Stream(ring.device)
        self._next = 0
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = torch.cuda.graph_pool_handle()
        # Largest batch first, so that the smaller graphs find their memory in the shared pool.
        bar = tqdm(reversed(self.buckets), "capturing", len(self.buckets), leave=False, disable=not progress)
        for rows in bar:
            self._warm_up(step, rows)
            self._graphs[rows] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graphs[rows], pool=pool):
                step(rows)

    def start(self, index: int) -> None:
        """The next token that the device writes is number `index` (0 after the state was reset)."""
        self._next = index

    def step(self, rows: int) -> None:
        """Enqueue one step of the first `rows` sequences and the copy of its tokens."""
        self._graphs[self.bucket(rows)].replay()
        self.publish()

    def publish(self) -> None:
        """Enqueue the copy of the row of the ring that was written last, by a replay or by the caller."""
        slot = self._next % self._slots
        self._finished[slot].record(torch.cuda.current_stream(self._ring.device))
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._finished[slot])
            self._host[slot].copy_(self._ring[slot], non_blocking=True)
            self._arrived[slot].record(self._copies)
        self._next += 1

    def tokens(self, index: int) -> list[int]:
        """The tokens of step `index`, one for each sequence, -1 where it was not active. Only the last R are kept."""
        if not self._next - self._slots <= index < self._next:
            kept = f"{max(0, self._next - self._slots)} to {self._next - 1}"
            raise IndexError(f"the tokens of step {index} are not in the ring; it holds steps {kept}")
        slot = index % self._slots
        self._arrived[slot].synchronize()
        return self._host[slot].tolist()

    def bucket(self, rows: int) -> int:
        """The smallest captured batch that holds `rows` sequences."""
        for bucket in self.buckets:
            if rows <= bucket:
                return bucket
        raise ValueError(f"{rows} sequences are more than the largest captured batch, {self.buckets[-1]}")

    def _warm_up(self, step: Callable[[int], Tensor], rows: int) -> None:
        stream = torch.cuda.Stream(self._ring.device)
        stream.wait_stream(torch.cuda.current_stream(self._ring.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                step(rows)
        torch.cuda.current_stream(self._ring.device).wait_stream(stream)
        torch.cuda.synchronize(self._ring.device)
