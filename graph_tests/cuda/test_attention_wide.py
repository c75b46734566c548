"""Sparse attention of many rows on the GPU: CTAs that own 64 heads and go from row to row.

What can go wrong here and not in a CTA of one row: a row that begins in the memory that the one before still reads,
rows of no unit, of one and of an odd number of them, two warpgroups that meet in the middle of a pair. So rows of all
lengths follow each other. Their bits are those of a row alone, which other kernels compute.
"""

import pytest
import torch

from graph_tests.cuda.kernel_checks import assert_rows_independent, bits, check_kernel, on_cuda
from graph_tests.cuda.test_attention import KINDS, OPS, TENSOR, close, full, rows_from
from graph_tests.ops.attention_cases import sequence_arguments

pytestmark = pytest.mark.cuda

# Units of 64 keys of the window: none, 1 and 2; the last key alone, the first alone, all.
LENGTHS = (-1, 0, 62, 63, 64, 126, 127, 128, 300, -1, -1, 64, 5, 1000, 190)


def many(rows: int) -> list[list[int]]:
    return [[LENGTHS[row % len(LENGTHS)]] for row in range(rows)]


@pytest.mark.sanitize
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_all_lengths(kind):
    check_kernel(f"sparse_attention_{kind}", full(kind, many(70), heads=64), TENSOR)


@pytest.mark.parametrize("heads", [40, 64, 72, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_has_the_bits_of_the_row_alone(kind, heads):
    arguments = full(kind, many(150), heads=heads, k=70)
    assert_rows_independent(f"sparse_attention_{kind}", arguments, sequence_arguments(kind), rows=range(len(LENGTHS)))


@pytest.mark.parametrize("page_size", [2, 61])
@pytest.mark.parametrize("kind", KINDS)
def test_page_sizes(kind, page_size):
    check_kernel(f"sparse_attention_{kind}", full(kind, many(70), heads=64, pages=(page_size, page_size)), TENSOR)


@pytest.mark.sanitize
@pytest.mark.parametrize("kind", KINDS)
def test_chunk(kind):
    """A prefill from position 0 on, at the boundary of every block of the compressor."""
    check_kernel(f"sparse_attention_{kind}", full(kind, [rows_from(0, 140)], heads=64), TENSOR)


@pytest.mark.parametrize("kind", KINDS)
def test_chunk_whose_reference_rises(kind):
    """Scores of hundreds: a unit exceeds those before by more than the slack, and the output so far is scaled down."""
    q, *rest = full(kind, [rows_from(100, 140)], heads=64, k=300, ratio=1)
    # fp32 sums of 512 products are off by up to 1e-3 of such scores, and weights by as much of themselves
    check_kernel(f"sparse_attention_{kind}", (q * 60, *rest), (close(2.0**-6, 2e-2), close(1e-6, 4e-3)))


@pytest.mark.parametrize("kind", KINDS)
def test_sinks_of_infinity(kind):
    sink = torch.linspace(-50, 50, 64)
    sink[::7], sink[3::7] = -torch.inf, torch.inf
    check_kernel(f"sparse_attention_{kind}", full(kind, many(70), heads=64, sink=sink), TENSOR)


@pytest.mark.parametrize("positions", [[[20 + row] for row in range(70)], [rows_from(20, 70)]], ids=["rows", "chunk"])
@pytest.mark.parametrize("kind", KINDS)
def test_scale_bytes_of_any_size(kind, positions):
    arguments = full(kind, positions, heads=64)
    scales = arguments[1][:, 64 * 576 : 64 * 584]
    scales.copy_(torch.randint(100, 140, scales.shape, generator=torch.Generator().manual_seed(0)))
    q = (arguments[0].float() * 2.0**-14).bfloat16()
    check_kernel(f"sparse_attention_{kind}", (q, *arguments[1:]), (close(2.0**-6, 64.0), close(1e-5, 1e-4)))


@pytest.mark.parametrize("kind", KINDS)
def test_queries_that_are_not_finite(kind):
    """A row of NaN queries leaves nothing behind in the row after it."""
    arguments = full(kind, many(150), heads=64)
    arguments[0][::3, :, 5], arguments[0][1::5, :, 60, 500] = torch.nan, torch.inf
    check_kernel(f"sparse_attention_{kind}", arguments, TENSOR)


@pytest.mark.parametrize("heads", [40, 72, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_chunk_of_many_heads(kind, heads):
    check_kernel(f"sparse_attention_{kind}", full(kind, [rows_from(0, 140)], heads=heads), TENSOR)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_several_sequences(kind):
    positions = [rows_from(0, 130), [-1] * 130, [*rows_from(300, 100), *[-1] * 30]]
    arguments = full(kind, positions, heads=64, pages=(61, 2), k=200)
    check_kernel(f"sparse_attention_{kind}", arguments, TENSOR)


@pytest.mark.parametrize("page", [-1, 2**31 - 1, -(2**31), 10**6])
def test_block_tables_may_hold_anything_where_there_is_no_page(page):
    arguments = full("compressed", [rows_from(0, 140)], heads=64)
    table = arguments[6]
    grown = torch.nn.functional.pad(table, (0, 3), value=page)
    expected = OPS.sparse_attention_compressed(*on_cuda(arguments))
    actual = OPS.sparse_attention_compressed(*on_cuda((*arguments[:6], grown, *arguments[7:])))
    for one, another in zip(actual, expected, strict=True):
        bits(one.cpu(), another.cpu())
