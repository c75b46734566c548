"""Streams of calls: which cases have one, what its calls read, and how it is timed."""

import pytest
import torch
from torch import Tensor

from benchmarks import call, streams, timing
from benchmarks.cases import all_cases, gemm, moe
from benchmarks.cases.gemm import FORMATS
from benchmarks.inputs import Inputs
from benchmarks.shapes import FLASH, PRO
from benchmarks.targets import COLD_TARGETS
from benchmarks.timing import Timer, Times
from graph_tests.bench.tiny_widths import TINY

RELEASED = {case.name: case for case in all_cases((FLASH, PRO))}
STREAMED = {name: case for name, case in RELEASED.items() if streams.is_streamed(case)}


def tiny_linear():
    return gemm.linear("fp8", "shared w2", 3, TINY.hidden_size, TINY.moe_intermediate_size)


def test_streamed_are_the_products_of_decode_that_the_readme_shows_and_three_more():
    shown = {name for name in COLD_TARGETS if RELEASED[name].tokens <= 64}
    more = {
        name for name in RELEASED if name.startswith("linear_fp8 ") and any(p in name for p in streams.OTHER_PRODUCTS)
    }
    assert shown and set(STREAMED) == shown | {name for name in more if RELEASED[name].tokens <= 64}
    assert len(STREAMED) == 18 + 3 * 3 * 2


@pytest.mark.parametrize("name", STREAMED)
def test_calls_of_a_released_case_read_several_times_what_l2_holds(name):
    """An H200 has 50 MB, torch says 63; no case needs more copies than there may be, nor much memory for them."""
    case = STREAMED[name]
    calls = -(-streams.BYTES // case.traffic.read)
    assert calls <= streams.MOST_CALLS and calls * case.traffic.read >= 8 * 62_914_560
    if not case.op_name.startswith("moe_"):
        assert calls * case.traffic.read < 1e9


def test_calls_of_a_product_have_weights_of_their_own(monkeypatch):
    case = tiny_linear()
    monkeypatch.setattr(streams, "BYTES", 3 * case.traffic.read)
    arguments = case.make(Inputs("cpu"))
    copies = [arguments, *(streams.own_copy(arguments, number) for number in (1, 2))]
    for parts in zip(*copies, strict=True):
        assert isinstance(parts[0], Tensor) and len({part.data_ptr() for part in parts}) == 3
    results = [each() for each in streams.stream(case, arguments)]
    assert len(results) == 3 and all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("form", FORMATS)
def test_calls_of_experts_read_others_of_the_same_tensors(form):
    """Eight experts of which a token takes two: the fourth call takes the last two, the fifth the first again."""
    case = moe.case(TINY, 1, form, TINY.n_routed_experts)
    arguments = case.make(Inputs("cpu"))
    place = next(at for at, part in enumerate(arguments) if part.dtype == torch.int32)
    taken = [streams.other_experts(arguments, number)[place].tolist() for number in (1, 3, 4)]
    assert arguments[place].tolist() == [[0, 1]] and taken == [[[2, 3]], [[6, 7]], [[0, 1]]]
    changed = streams.other_experts(arguments, 1)
    assert changed[place].dtype == torch.int32
    assert all(new is old for at, (new, old) in enumerate(zip(changed, arguments, strict=True)) if at != place)
    assert not torch.equal(case.op.overload(*arguments), case.op.overload(*changed))


def test_at_least_one_call_and_at_most_so_many(monkeypatch):
    case = tiny_linear()
    arguments = case.make(Inputs("cpu"))
    monkeypatch.setattr(streams, "BYTES", 1)
    assert len(streams.stream(case, arguments)) == 1
    monkeypatch.setattr(streams, "BYTES", 1 << 40)
    assert len(streams.stream(case, arguments)) == streams.MOST_CALLS


def test_only_streamed_cases_are_timed_in_a_stream(monkeypatch):
    class FakeTimer:
        def times(self, call):
            return Times(1.0, 2.0, 4)

        def streamed(self, calls):
            return float(len(calls))

    case = tiny_linear()
    monkeypatch.setattr(call, "prepare", lambda case, device: [lambda: None] * 3)
    assert call.timed(case, FakeTimer()).streamed == 3.0
    other = gemm.linear("fp8", "q_b", 3, 128, 128)  # no target
    assert call.timed(other, FakeTimer()) == Times(1.0, 2.0, 4)


def test_short_streams_are_repeated_in_one_graph(monkeypatch):
    """Each call takes 20 us here: three calls 17 times in a graph take about a millisecond."""
    graphs = []
    monkeypatch.setattr(timing, "captured", lambda calls: graphs.append(calls) or calls)
    monkeypatch.setattr(timing, "replay_us", lambda graph, replays: 20.0 * len(graph))
    timer = Timer.__new__(Timer)
    timer.replays = 31
    assert timer.streamed(["a", "b", "c"]) == 20.0
    assert graphs == [["a", "b", "c"], ["a", "b", "c"] * 17]


@pytest.mark.cuda
def test_streamed_time_of_a_product_on_a_gpu():
    case = tiny_linear()
    times = call.timed(case, Timer(3))
    assert 0 < times.streamed < 100
