"""Scores of index keys and the selection of the best: kernels against references, and the selection against the sort of
the kernel's own scores."""

import math

import pytest
import torch
from torch import Tensor

from dsv4_ops.ops import indexer, pages
from dsv4_ops.ops.indexer import top_k_reference
from graph_tests.checks import assert_bits_equal, row_strided
from graph_tests.cuda.indexer_inputs import (
    FORMS,
    RATIO,
    dequantised,
    exact_arguments,
    random_arguments,
    truncated_product,
)
from graph_tests.cuda.kernel_checks import assert_rows_independent, check_kernel, close, on_cuda
from graph_tests.ops.test_indexer_topk import SCORES, arguments_for, sorted_by_python

pytestmark = pytest.mark.cuda

OPS = torch.ops.dsv4
EXACT = close(0.0)
PACKED = ("fp8", "fp4")
TOKENS = [(3, 1), (2, 2), (1, 5), (2, 11)]  # B, S
# heads, dim, page_size, max_pages, padding of a page. 64 x 128 in pages at multiples of 16 bytes: on the tensor cores.
LAYOUTS = {
    "model": (64, 128, 64, 3, 0),
    "pages of 2": (64, 128, 2, 70, 8),
    "pages of 12": (64, 128, 12, 11, 16),
    "pages of 61": (64, 128, 61, 2, 4),
    "16 heads": (16, 128, 16, 5, 0),
    "3 heads of 64": (3, 64, 8, 9, 0),
}


def with_layout(make, form: str, tokens: tuple[int, int], layout: str) -> tuple:
    heads, dim, page_size, max_pages, padding = LAYOUTS[layout]
    return make(
        form, *tokens, heads=heads, dim=dim, page_size=page_size, max_pages=max_pages, padding=padding
    )  # fmt: skip


def both(form: str, arguments: tuple, k: int) -> tuple[Tensor, Tensor]:
    """The kernels' scores and selections, on the CPU."""
    moved = on_cuda(arguments)
    scores = getattr(OPS, f"index_scores_{form}")(*moved)
    return scores.cpu(), getattr(OPS, f"index_topk_{form}")(*moved, k).cpu()


def assert_selects_the_best(form: str, arguments: tuple, k: int) -> None:
    scores, picks = both(form, arguments, k)
    assert torch.equal(picks, top_k_reference(scores, arguments[-3], RATIO, k))


# ---- against the references ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("form", FORMS)
def test_exact_sums_give_the_scores_and_picks_of_the_reference(form, tokens, layout):
    """Many scores are equal: ties go to the lowest entry."""
    arguments = with_layout(exact_arguments, form, tokens, layout)
    check_kernel(f"index_scores_{form}", arguments, EXACT)
    for k in (1, 7, 64, 200):
        check_kernel(f"index_topk_{form}", (*arguments, k))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_scores_of_random_keys(form, layout):
    """The sum over dim and heads errs by (dim + heads + 3) * 2^-23 of the sum of magnitudes at most, in bf16 and on the
    CUDA cores. FP8 on the tensor cores cuts off 33 addends in each of four steps at 2^-13 of the largest."""
    arguments = with_layout(random_arguments, form, (2, 3), layout)
    heads, dim = LAYOUTS[layout][:2]
    q, keys = dequantised(form, arguments)
    w, positions = arguments[-6].double(), arguments[-3]
    expected = (torch.einsum("bshd,bcd->bshc", q, keys).relu() * w[..., None]).sum(2)
    error = (dim + heads + 3) * 2.0**-23 + (4 * 33 * 2.0**-13 if form == "fp8" else 0)
    bound = torch.einsum("bshd,bcd,bsh->bsc", q.abs(), keys.abs(), w.abs()) * error
    scores = getattr(OPS, f"index_scores_{form}")(*on_cuda(arguments)).cpu()
    visible = torch.arange(keys.shape[1]) < ((positions + 1) // RATIO)[..., None]
    assert ((scores - expected).abs() <= bound)[visible].all()
    assert (scores[~visible] == -math.inf).all()


@pytest.mark.parametrize("rows", [1, 3])
def test_fp8_scores_are_those_of_truncated_products(rows):
    """What is left is the fp32 sum over 64 heads: below 70 * 2^-24 of the norm."""
    arguments = random_arguments("fp8", 1, rows, max_pages=3)
    w, pool, table, positions, _, page_size = arguments[-6:]
    entries = torch.arange(3 * page_size)[None]
    codes = pages.gather_entries(pool, table, entries, page_size, 0, 128).view(torch.float8_e4m3fn).double()[0]
    scale = (
        pages.gather_entries(pool, table, entries, page_size, page_size * 128, 4).view(torch.float32).double()[0, :, 0]
    )
    scores = OPS.index_scores_fp8(*on_cuda(arguments)).cpu()
    for row in range(rows):
        visible = int(positions[0, row] + 1) // RATIO
        product = truncated_product(arguments[0][0, row].double(), codes[:visible]).relu()
        expected = (product * w[0, row, :, None].double()).sum(0) * scale[:visible]
        assert (scores[0, row, :visible] - expected).norm() < 5e-6 * expected.norm()


# ---- the selection ----


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
    """Only groups of 16 whose best entry is good enough are looked at; if these are too many, every entry is."""
    scores = long_scores(kind)
    positions = [4 * LONG - 1, 4 * 50000, 4 * 49152 - 1, 4 * 600, -1]
    arguments = on_cuda(arguments_for(scores.tolist(), positions))
    for k in (1, 512, 1024, 2048):
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
def test_rows_do_not_depend_on_the_batch(form):
    arguments = random_arguments(form, 9, 1, max_pages=9)
    places = tuple(range(len(arguments) - 5)) + (len(arguments) - 4, len(arguments) - 3)
    assert_rows_independent(f"index_scores_{form}", arguments, batched=places, rows=(0, 1, 5, 8))
    assert_rows_independent(f"index_topk_{form}", (*arguments, 100), batched=places, rows=(0, 1, 5, 8))


@pytest.mark.parametrize("form", PACKED)
def test_rows_of_a_sequence_do_not_depend_on_each_other(form):
    """Several rows share a product on the tensor cores; one row alone takes another kernel."""
    arguments = on_cuda(random_arguments(form, 1, 13, max_pages=5))
    together = getattr(OPS, f"index_scores_{form}")(*arguments)
    for row in range(13):
        query = (part[:, row : row + 1] for part in arguments[:-5])
        alone = getattr(OPS, f"index_scores_{form}")(
            *query, *arguments[-5:-3], arguments[-3][:, row : row + 1], *arguments[-2:]
        )
        assert_bits_equal(alone[:, 0].cpu(), together[:, row].cpu())


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [(0, 1), (3, 0), (2, 3)])
def test_empty_batches_and_strided_rows(form, tokens):
    if 0 in tokens:
        heads = exact_arguments(form, 1, 1, max_pages=2)
        arguments = tuple(part[:0].expand(tokens[0], *part.shape[1:]) for part in heads[:-5])
        arguments = tuple(part.new_empty((*tokens, *part.shape[2:])) for part in arguments)
        table, positions = heads[-4].new_zeros((tokens[0], 2)), heads[-3].new_zeros(tokens)
        arguments = (*arguments, heads[-5], table, positions, *heads[-2:])
    else:
        arguments = exact_arguments(form, *tokens, max_pages=4)
        arguments = tuple(row_strided(part) if isinstance(part, Tensor) else part for part in arguments)
    check_kernel(f"index_scores_{form}", arguments, EXACT)
    check_kernel(f"index_topk_{form}", (*arguments, 40))


@pytest.mark.sanitize
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 3])
def test_small_call(form, rows):
    arguments = exact_arguments(form, 2, rows, max_pages=3, heads=8 if form == "plain" else 64)
    check_kernel(f"index_scores_{form}", arguments, EXACT)
    check_kernel(f"index_topk_{form}", (*arguments, 50))


def test_wrong_arguments_are_named():
    q, w, pool, table, positions, ratio, page_size = on_cuda(exact_arguments("fp8", 1, 1))
    out = {"indices": torch.empty(1, 1, 5, dtype=torch.int32, device="cuda")}
    out["workspace"] = torch.empty(4096, dtype=torch.int32, device="cuda")
    call = OPS.index_topk_fp8.out
    with pytest.raises(RuntimeError, match="dsv4::index_topk_fp8: q8 must be"):
        call(q.float(), w, pool, table, positions, ratio, page_size, 5, **out)
    with pytest.raises(RuntimeError, match="dsv4::index_topk_fp8: pool must be"):
        call(q, w, pool[:, :-64], table, positions, ratio, page_size, 5, **out)
    with pytest.raises(RuntimeError, match="dsv4::index_topk_fp8: indices must be"):
        call(q, w, pool, table, positions, ratio, page_size, 6, **out)
    with pytest.raises(RuntimeError, match="dsv4::index_topk_fp8: workspace must be"):
        call(q, w, pool, table, positions, ratio, page_size, 5, indices=out["indices"], workspace=None)
    with pytest.raises(RuntimeError, match="dsv4::index_topk_fp8: positions must be"):
        call(q, w, pool, table, positions.long(), ratio, page_size, 5, **out)
