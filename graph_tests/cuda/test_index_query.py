"""index_query_plain, index_query_fp8 and index_query_fp4 against their references: every step is exact or rounded where
the reference rounds, so every bit agrees."""

import pytest
import torch

from dsv4_ops.ops.rope import rope_table
from graph_tests.checks import assert_bits_equal, row_strided
from graph_tests.cuda.kernel_checks import assert_rows_independent, check_kernel, on_cuda

pytestmark = pytest.mark.cuda

OPS = torch.ops.dsv4
FORMS = ("plain", "fp8", "fp4")
BF16, F32 = torch.bfloat16, torch.float32
MODEL = (64, 128, 64)  # Hi, Di, R
SHAPES = [MODEL, (5, 64, 32), (3, 32, 16), (2, 256, 64), (3, 128, 128), (3, 64, 6)]
TOKENS = [(0, 1), (3, 2), (1, 67)]  # B, S


def arguments(tokens: tuple[int, int], shape: tuple[int, int, int], q_dtype=BF16, weights_dtype=BF16) -> tuple:
    """Heads of many magnitudes; the first sequence lacks its last token."""
    (batch, rows), (heads, dim, rope_dim) = tokens, shape
    generator = torch.Generator().manual_seed(rows * 1000 + dim)
    q = torch.randn(batch, rows, heads, dim, generator=generator)
    q *= torch.randn(batch, rows, heads, 1, generator=generator).mul(3).exp()
    weights = torch.randn(batch, rows, heads, generator=generator).to(weights_dtype)
    positions = torch.arange(rows, dtype=torch.int32) + 37 * torch.arange(batch, dtype=torch.int32)[:, None] % 200
    if batch and rows > 1:
        positions[0, -1] = -1
    return q.to(q_dtype), weights, rope_table(rope_dim, 400, 1.6e5), positions


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, BF16), (BF16, F32)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_index_query_has_the_bits_of_the_reference(form, shape, dtypes, tokens):
    check_kernel(f"index_query_{form}", arguments(tokens, shape, *dtypes))


@pytest.mark.parametrize("form", FORMS)
def test_weights_beside_others_in_fp32_are_rounded_to_the_dtype_of_q(form):
    """As the columns of a wider product: the bits of weights that were rounded before."""
    q, weights, table, positions = arguments((3, 2), MODEL, BF16, F32)
    op = getattr(OPS, f"index_query_{form}")
    check_kernel(f"index_query_{form}", (q, row_strided(weights, 2560), table, positions))
    given = on_cuda((q, weights, table, positions))
    rounded = op(given[0], given[1].bfloat16(), *given[2:])
    for actual, expected in zip(op(*given), rounded, strict=True):
        assert_bits_equal(actual, expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_the_model(form):
    check_kernel(f"index_query_{form}", arguments((130, 1), MODEL))


@pytest.mark.parametrize("form", FORMS)
def test_a_large_batch_has_the_bits_of_the_reference(form):
    """Enough heads for threads that own sixteen columns."""
    check_kernel(f"index_query_{form}", arguments((2, 267), MODEL))


@pytest.mark.parametrize("form", FORMS)
def test_positions_that_the_kernel_before_has_written(form):
    q, weights, table, positions = on_cuda(arguments((8, 1), MODEL))
    op = getattr(OPS, f"index_query_{form}")
    expected = [op(q, weights, table, positions + step) for step in range(20)]
    moving, found = torch.zeros_like(positions), []
    torch.cuda.synchronize()
    for step in range(20):
        torch.add(positions, step, out=moving)
        found.append(op(q, weights, table, moving))
    for actual, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(actual, wanted, strict=True))


@pytest.mark.parametrize("shape", [(3, 40, 8), (3, 96, 64)])
def test_a_plain_query_may_have_any_multiple_of_eight_channels(shape):
    check_kernel("index_query_plain", arguments((3, 2), shape))


@pytest.mark.sanitize
@pytest.mark.parametrize("form", FORMS)
def test_index_query_of_zeros_and_of_what_is_not_finite(form):
    q, *others = arguments((2, 3), (6, 128, 64))
    q[0, 0, 0], q[0, 0, 1] = 0, -0.0
    q[0, 0, 2, 3], q[0, 0, 3, 127], q[0, 0, 4, 0] = torch.nan, torch.inf, -torch.inf
    q[0, 0, 5] = torch.finfo(BF16).max
    q[0, 1, 0], q[0, 1, 1, ::3] = 2.0**-130, 1e-6
    check_kernel(f"index_query_{form}", (q, *others))


@pytest.mark.parametrize("form", FORMS)
def test_inputs_with_padding(form):
    q, weights, angles, positions = arguments((3, 2), (5, 128, 64))
    padded = (row_strided(q), row_strided(weights, 3), angles, row_strided(positions, 5))
    check_kernel(f"index_query_{form}", padded)


@pytest.mark.parametrize("form", FORMS)
def test_queries_do_not_depend_on_the_batch(form):
    assert_rows_independent(f"index_query_{form}", arguments((130, 1), MODEL), batched=(0, 1, 3), rows=(0, 1, 77, 129))


WRONG = {
    "a width without a kernel": (0, lambda q: q.repeat(1, 1, 1, 4), r"q must be \[B, S, Hi, Di\] with Di 32, 64, 128"),
    "heads in another order": (0, lambda q: q.transpose(1, 2).contiguous().transpose(1, 2), "q must be rows at one"),
    "weights of another batch": (1, lambda weights: weights[:1], r"weights must be \[2, 3, 4\]"),
    "positions of another batch": (3, lambda positions: positions[:1], r"positions must be \[2, 3\]"),
    "a table with gaps": (2, lambda table: row_strided(table), "rope_table must be contiguous"),
}


@pytest.mark.parametrize(("place", "change", "message"), WRONG.values(), ids=WRONG)
def test_refuses_by_name(place, change, message):
    given = list(arguments((2, 3), (4, 128, 64)))
    given[place] = change(given[place])
    with pytest.raises(RuntimeError, match=f"dsv4::index_query_fp8: {message}"):
        OPS.index_query_fp8(*on_cuda(tuple(given)))
