"""Scores of index keys and the selection of the best: kernels against references, and their contracts."""

import math

import pytest
import torch
from torch import Tensor

from dsv4_ops.ops import pages
from graph_tests.checks import assert_bits_equal, row_strided
from graph_tests.cuda.fp8_products import truncated_product
from graph_tests.cuda.indexer_inputs import (
    FORMS,
    RATIO,
    dequantised,
    exact_arguments,
    order_of_steps,
    random_arguments,
)
from graph_tests.cuda.kernel_checks import assert_rows_independent, check_kernel, close, on_cuda

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
        product = truncated_product(arguments[0][0, row].double(), codes[:visible], order_of_steps()).relu()
        expected = (product * w[0, row, :, None].double()).sum(0) * scale[:visible]
        assert (scores[0, row, :visible] - expected).norm() < 5e-6 * expected.norm()


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_not_finite_stays_in_its_row_and_key(form, rows):
    arguments = exact_arguments(form, 2, rows, max_pages=2)
    w, pool, table, positions, _, page_size = arguments[-6:]
    positions.copy_(torch.tensor([[511], [500]]).expand(2, rows))
    w[0, 0, 5], w[1, -1, 7] = math.inf, math.nan
    if form == "fp8":
        arguments[0].view(torch.uint8)[1, 0, 3, 7] = 0x7F
    else:
        arguments[1][1, 0, 3, 1] = 255
    scales = page_size * (128 if form == "fp8" else 64)
    pool[table[0, 0], scales + 5 * 4 : scales + 6 * 4] = 255
    check_kernel(f"index_scores_{form}", arguments, EXACT)


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
@pytest.mark.parametrize("tokens", [(0, 1), (3, 0), (2, 3)])
def test_empty_batches_and_strided_rows(form, tokens):
    if 0 in tokens:
        one = exact_arguments(form, 1, 1, max_pages=2)
        query_and_weights = (part.new_empty((*tokens, *part.shape[2:])) for part in one[:-5])
        table, positions = one[-4].new_zeros((tokens[0], 2)), one[-3].new_zeros(tokens)
        arguments = (*query_and_weights, one[-5], table, positions, *one[-2:])
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
