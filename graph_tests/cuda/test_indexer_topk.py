"""The selection of the best index entries: against the sort of the kernel's own scores, on inputs that break
approximate or unstable selections, at every length of context."""

import math

import pytest
import torch
from torch import Tensor

from dsv4_ops.ops import indexer
from dsv4_ops.ops.indexer import top_k_reference
from graph_tests.cuda.indexer_inputs import FORMS, RATIO, dequantised, exact_arguments, random_arguments
from graph_tests.cuda.kernel_checks import on_cuda
from graph_tests.ops.test_indexer_topk import SCORES, arguments_for, sorted_by_python

pytestmark = pytest.mark.cuda

OPS = torch.ops.dsv4
PACKED = ("fp8", "fp4")


def both(form: str, arguments: tuple, k: int) -> tuple[Tensor, Tensor]:
    """The kernels' scores and selections, on the CPU."""
    moved = on_cuda(arguments)
    scores = getattr(OPS, f"index_scores_{form}")(*moved)
    return scores.cpu(), getattr(OPS, f"index_topk_{form}")(*moved, k).cpu()


def assert_selects_the_best(form: str, arguments: tuple, k: int) -> None:
    scores, picks = both(form, arguments, k)
    assert torch.equal(picks, top_k_reference(scores, arguments[-3], RATIO, k))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("tokens", "max_pages"), [((3, 1), 40), ((1, 70), 33), ((2, 4), 130)])
@pytest.mark.parametrize("k", [1, 512, 700, 1024, 2048])
def test_selection_is_the_sort_of_the_kernels_scores(form, tokens, max_pages, k):
    if form == "plain" and max_pages > 40:
        max_pages = 20
    assert_selects_the_best(form, random_arguments(form, *tokens, max_pages=max_pages), k)


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("k", [1, 7, 43, 44, 45])
def test_selection_from_scores_that_break_approximate_ones(scores, k):
    positions = [-1, 0, 2, 3, 4, 7, 33, 71, 4 * len(scores) - 1]
    picks = OPS.index_topk_plain(*on_cuda(arguments_for(scores, positions)), k).cpu()
    for row, position in enumerate(positions):
        assert picks[0, row].tolist() == sorted_by_python(scores, (position + 1) // RATIO, k)


LONG = 66000  # entries: a row that does not fit in shared memory


def long_scores(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    entry = torch.arange(LONG).float()
    return {
        "normal": lambda: torch.randn(LONG, generator=generator),
        "all equal": lambda: torch.ones(LONG),
        "all minus infinity but one": lambda: torch.full((LONG,), -math.inf).index_fill(0, torch.tensor(60001), 1.0),
        "winners adjacent": lambda: ((entry > 50000) & (entry < 51500)).float(),
        "one winner in every group": lambda: (entry % 16 == 5).float() + torch.rand(LONG, generator=generator) / 2,
        "rising": lambda: entry,
        "falling": lambda: -entry,
        "few levels": lambda: torch.randint(0, 5, (LONG,), generator=generator).float(),
        "in one binade": lambda: 1 + torch.rand(LONG, generator=generator),
        "of all sizes": lambda: (torch.randn(LONG, generator=generator) * 20).exp(),
    }[kind]()


LONG_KINDS = (
    "normal", "all equal", "all minus infinity but one", "winners adjacent", "one winner in every group", "rising",
    "falling", "few levels", "in one binade", "of all sizes",
)  # fmt: skip


@pytest.mark.parametrize("kind", LONG_KINDS)
def test_selection_from_long_rows(kind):
    """Only groups of 16 whose best entry is good enough are looked at; if these are too many, every entry is, as it is
    where there are no more than k groups."""
    scores = long_scores(kind)
    positions = [4 * LONG - 1, 4 * 50000, 4 * 49170, 4 * 49152 - 1, 4 * 600, -1]
    arguments = on_cuda(arguments_for(scores.tolist(), positions))
    for k in (1, 512, 1024, 2048, 3000, 3100):
        picks = OPS.index_topk_plain(*arguments, k).cpu()
        for row, position in enumerate(positions):
            seen = scores[: (position + 1) // RATIO]
            best = seen.sort(descending=True, stable=True).indices[:k].sort().values
            wanted = torch.nn.functional.pad(best, (0, k - len(best)), value=-1)
            assert torch.equal(picks[0, row].long(), wanted), (k, position)


@pytest.mark.parametrize("form", PACKED)
def test_a_context_of_a_million_tokens(form):
    generator = torch.Generator().manual_seed(1)
    arguments = list(random_arguments(form, 1, 1, max_pages=64))
    arguments[-4] = arguments[-4][:, torch.randint(0, 64, (4096,), generator=generator)]  # pages come again: ties
    for position in (2**20 - 1, 2**20 - 5, 700001):
        arguments[-3] = torch.tensor([[position]], dtype=torch.int32)
        for k in (512, 1024, 2048):
            assert_selects_the_best(form, tuple(arguments), k)


def test_recall_of_fp8_picks():
    """Against fp64 scores of the same FP8 operands: 99.9 % of the picks."""
    arguments = random_arguments("fp8", 12, 1, max_pages=64)
    arguments = (*arguments[:-3], torch.full((12, 1), 64 * 64 * RATIO - 1, dtype=torch.int32), *arguments[-2:])
    q, keys = dequantised("fp8", arguments)
    exact = (torch.einsum("bshd,bcd->bshc", q, keys).relu() * arguments[-6].double()[..., None]).sum(2)
    best = exact.topk(512).indices.sort().values
    picks = OPS.index_topk_fp8(*on_cuda(arguments), 512).cpu()
    found = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(picks[:, 0], best[:, 0], strict=True))
    assert found >= 0.999 * 12 * 512


# ---- contracts ----


@pytest.mark.parametrize("form", FORMS)
def test_a_small_workspace_gives_the_same_picks(form, monkeypatch):
    """Chunks of rows: the last one is shorter, and the first row of a chunk may be in the middle of a sequence."""
    arguments = (*on_cuda(random_arguments(form, 3, 21, max_pages=6)), 90)
    op = getattr(OPS, f"index_topk_{form}")
    wanted = op(*arguments)
    for words in (1, 3 * 6 * 68, 20 * 6 * 68):
        monkeypatch.setattr(indexer, "WORKSPACE_BYTES", 4 * words)
        assert torch.equal(op(*arguments), wanted)


def test_the_workspace_has_an_upper_end():
    row = torch.empty(1, device="meta")
    table = row.new_empty((128, 2**20 // RATIO // 64), dtype=torch.int32)
    w = row.new_empty((128, 4096, 64))
    assert indexer._topk_workspace(w, w, None, table, None, RATIO, 64, 512).numel() * 4 <= 64 << 20


@pytest.mark.parametrize("form", FORMS)
def test_twenty_runs_give_the_same_bits(form):
    arguments = (*on_cuda(exact_arguments(form, 2, 3, max_pages=20)), 512)
    op = getattr(OPS, f"index_topk_{form}")
    first = op(*arguments)
    assert all(torch.equal(op(*arguments), first) for _ in range(20))


def test_one_graph_from_an_empty_context_to_a_full_one():
    arguments = random_arguments("fp8", 2, 1, max_pages=40)
    moved = on_cuda(arguments)
    OPS.index_topk_fp8(*moved, 512)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        picks = OPS.index_topk_fp8(*moved, 512)
    scores = OPS.index_scores_fp8(*moved[:-3], torch.full_like(moved[-3], 2**20), *moved[-2:]).cpu()
    for position in (-1, 0, 3, 511 * 4, 512 * 4 - 1, 513 * 4, 2000 * 4, 2560 * 4 - 1):
        moved[-3].copy_(torch.tensor([[position], [max(position - 4, -1)]]))
        graph.replay()
        positions = moved[-3].cpu()
        seen = torch.arange(2560) < ((positions + 1) // RATIO)[..., None]
        wanted = top_k_reference(scores.where(seen, -math.inf), positions, RATIO, 512)
        assert torch.equal(picks.cpu(), wanted)
