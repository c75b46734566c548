"""Sparse attention on the GPU against its reference, at every boundary of positions, pages and keys.

Bits do not depend on how the work is cut: heads of a CTA, and whether a CTA has all of a row or two kernels share it
out, follow from the number of rows, so a row alone and the row in a batch take different ways to the same bits.
"""

import pytest
import torch

from dsv4_ops.ops import attention_workspace
from dsv4_ops.registry import TABLE
from graph_tests.checks import assert_bits_equal, row_strided
from graph_tests.cuda.kernel_checks import assert_rows_independent, check_kernel, close, on_cuda
from graph_tests.ops.attention_cases import FULL, SMALL, make, sequence_arguments
from graph_tests.ops.test_attention import judge

pytestmark = pytest.mark.cuda

OPS = torch.ops.dsv4
KINDS = ("window", "selected", "compressed")
BF16, F32 = torch.bfloat16, torch.float32
# Tensor cores take weights in bf16. Each is off by up to 2^-9 of itself, and a row of few keys sees that undiluted:
# keys are below 9 and a rounded weight has at most half of the sum, 2^-10 * 9. Besides, the output is rounded. lse is a
# sum of fp32 weights.
TENSOR = (close(2.0**-7, 9e-3), close(1e-5, 1e-5))
# Sums of fp32 products in another order: see graph_tests/ops/test_attention.py.
PLAIN = (close(2.0**-7, 2e-5), close(1e-6, 1e-5)), (close(1e-5, 2e-5), close(1e-6, 1e-5))


def rows_from(start: int, rows: int) -> list[int]:
    return list(range(start, start + rows))


def full(kind: str, positions: list[list[int]], **options) -> tuple:
    """Arguments at full size that the tensor cores take."""
    defaults = {"window": 128, "pages": (64, 64), "ratio": 4, "k": 100, "heads": 16}
    return make(kind, positions, dims=FULL, dtype=BF16, **(defaults | options))[0]


def run(kind: str, arguments: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    return getattr(OPS, f"sparse_attention_{kind}")(*on_cuda(arguments))


def check(kind: str, arguments: tuple) -> None:
    check_kernel(f"sparse_attention_{kind}", arguments, TENSOR)


@pytest.mark.sanitize
@pytest.mark.parametrize("kind", KINDS)
def test_window_boundaries(kind):
    check(kind, full(kind, [[position] for position in (0, 1, 126, 127, 128, 129, 130)]))


@pytest.mark.parametrize("page_size", [2, 61, 64, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_page_sizes(kind, page_size):
    check(kind, full(kind, [[1000], [255], [63]], pages=(page_size, page_size)))


@pytest.mark.parametrize("heads", [8, 16, 24, 32, 40, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_head_counts(kind, heads):
    check(kind, full(kind, [[300], [9]], heads=heads))


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_several_query_rows(kind, rows):
    check(kind, full(kind, [rows_from(start, rows) for start in (0, 125, 500)]))


@pytest.mark.parametrize(("ratio", "positions"), [(4, (0, 2, 3, 4, 6, 7)), (128, (126, 127, 128, 254, 255, 256, 1023))])
def test_compressed_entry_is_visible_from_the_last_position_of_its_block(ratio, positions):
    check("compressed", full("compressed", [[position] for position in positions], ratio=ratio))


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 127, 128, 129, 512, 1024])
def test_numbers_of_selected_entries(keys):
    check("selected", full("selected", [[2047], [900]], ratio=1, k=keys))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_rows_are_zero(kind):
    positions = [[7, 8, -1, -1], [-1, -1, -1, -1], [200, 201, 202, 203], [0, -1, -1, -1]]
    arguments = full(kind, positions)
    check(kind, arguments)
    o, lse = run(kind, arguments)
    empty = torch.tensor(positions) < 0
    assert (o.cpu()[empty] == 0).all() and (lse.cpu()[empty] == -torch.inf).all()


def test_any_negative_index_is_skipped():
    arguments = full("selected", [rows_from(60, 4)])
    indices = arguments[7]
    indices[0, 0, ::3], indices[0, 1], indices[0, 2, 5] = -(2**31), -7, -100
    check("selected", arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_sinks_of_infinity(kind):
    sink = torch.tensor([-torch.inf, torch.inf, 0.0, 100.0, -100.0, 30.0, -torch.inf, torch.inf])
    arguments = full(kind, [[0], [400], [-1]], heads=8, sink=sink)
    check(kind, arguments)
    o, _ = run(kind, arguments)
    assert (o[:, :, [1, 7]] == 0).all() and o.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_large_scores(kind):
    """Scores of about 2000: fp32 sums of 512 products are off by up to 1e-3, and weights by as much of themselves."""
    q, *rest = full(kind, [[400], [3]])
    check_kernel(f"sparse_attention_{kind}", (q * 100, *rest), (close(2.0**-6, 2e-2), close(1e-6, 4e-3)))


@pytest.mark.parametrize("kind", KINDS)
def test_scale_bytes_of_any_size(kind):
    """Scales above 2^7 take a second factor: the first one's exponent would not fit bf16."""
    arguments = full(kind, [[20], [70]], pages=(64, 64))
    pool = arguments[1]
    start = 64 * 576
    scales = pool[:, start : start + 64 * 8]
    scales.copy_(torch.randint(100, 140, scales.shape, generator=torch.Generator().manual_seed(0)))
    q = (arguments[0].float() * 2.0**-14).bfloat16()
    # keys reach 2^12 * 4, and the weights' rounding errors with them
    check_kernel(f"sparse_attention_{kind}", (q, *arguments[1:]), (close(2.0**-6, 64.0), close(1e-5, 1e-4)))


@pytest.mark.parametrize("kind", KINDS)
def test_queries_that_are_not_finite(kind):
    arguments = full(kind, [[200], [201], [202]])
    arguments[0][0, 0, 3, 5], arguments[0][1, 0, 4, 500] = torch.nan, torch.inf
    check(kind, arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_last_position_of_a_million(kind):
    check(kind, full(kind, [[2**20 - 1]], ratio=2**13, k=64))


@pytest.mark.parametrize("kind", KINDS)
def test_error_against_fp64(kind):
    """The bounds that FlashMLA's tests demand of it: absolute 1e-3, relative 2 / 128, cosine distance 5e-6."""
    positions = [[1000, 1001], [130, 131]]
    arguments, keys = make(kind, positions, dims=FULL, dtype=BF16, window=128, pages=(64, 64), k=512, heads=64)
    o, lse = (result.cpu().double() for result in run(kind, arguments))
    expected, expected_lse = judge(arguments, keys, positions, FULL)
    size = max(key.abs().max() for row in keys for chosen in row for key in chosen)  # the bounds are for keys below 1
    torch.testing.assert_close(o, expected, rtol=2 / 128, atol=1e-3 * size)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-6)
    assert 1 - 2 * (o * expected).sum() / (o.square().sum() + expected.square().sum()) < 5e-6


@pytest.mark.parametrize("heads", [8, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(kind, heads):
    arguments = full(kind, [[40 + b * 5, 41 + b * 5] for b in range(80)], heads=heads)
    assert_rows_independent(f"sparse_attention_{kind}", arguments, sequence_arguments(kind), rows=(0, 1, 33, 79))


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_runs_give_the_same_bits(kind):
    arguments = on_cuda(full(kind, [[500, 501], [77, 78]], heads=64))
    first, *others = [getattr(OPS, f"sparse_attention_{kind}")(*arguments) for _ in range(20)]
    for other in others:
        for one, another in zip(first, other, strict=True):
            assert_bits_equal(another.cpu(), one.cpu())


@pytest.mark.parametrize(("rows", "heads"), [(1, 64), (16, 64), (9, 128)])
def test_calls_behind_each_other_do_not_mix(rows, heads):
    """Calls in a graph have the same workspace; the kernels of one may start before those of the last have ended."""
    q, *rest = on_cuda(full("selected", [[500 + row] for row in range(rows)], heads=heads))
    queries = (q, -q)
    expected = [OPS.sparse_attention_selected(one, *rest) for one in queries]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [OPS.sparse_attention_selected(queries[call % 2], *rest) for call in range(20)]
    for _ in range(5):
        graph.replay()
    for call, (o, lse) in enumerate(results):
        assert_bits_equal(o.cpu(), expected[call % 2][0].cpu())
        assert_bits_equal(lse.cpu(), expected[call % 2][1].cpu())


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_a_chunk_has_the_bits_of_the_row_alone(kind):
    arguments = on_cuda(full(kind, [rows_from(70, 140)], heads=8))
    op = getattr(OPS, f"sparse_attention_{kind}")
    chunk = op(*arguments)
    in_rows = [0, len(arguments) - {"window": 3, "selected": 4, "compressed": 5}[kind]]
    in_rows += [7] if kind == "selected" else []
    for row in (0, 57, 58, 139):
        alone = [a[:, row : row + 1] if i in in_rows else a for i, a in enumerate(arguments)]
        for one, many in zip(op(*alone), chunk, strict=True):
            assert_bits_equal(one.cpu(), many[:, row : row + 1].cpu())


def without_workspace(kind: str, arguments: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    op = TABLE[f"sparse_attention_{kind}"]
    o, lse = op.alloc(*arguments)
    op.packet.out(*arguments, o=o, lse=lse)
    return o, lse


@pytest.mark.parametrize(
    ("rows", "heads"), [pytest.param(3, 8, marks=pytest.mark.sanitize), (3, 16), (1, 64), (16, 64), (8, 128), (13, 24)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_without_workspace_the_bits_are_the_same(kind, rows, heads, monkeypatch):
    """One CTA has all of a row and 8, 16 or 32 heads, where two kernels would share it out. One row is padding."""
    monkeypatch.setattr(attention_workspace, "SPLIT_TILES_FEW_KEYS", attention_workspace.SPLIT_TILES)
    arguments = on_cuda(full(kind, [[-1 if row == 1 else 9 * row + 180] for row in range(rows)], heads=heads))
    assert TABLE[f"sparse_attention_{kind}"].workspace(*arguments).numel() > 0
    for one, another in zip(run(kind, arguments), without_workspace(kind, arguments), strict=True):
        assert_bits_equal(another.cpu(), one.cpu())


@pytest.mark.parametrize("heads", [8, 16, 24, 64])
def test_more_keys_than_stages(heads):
    """Two kernels share out a row of 33 units, more than either has room for at a time."""
    arguments = full("compressed", [[2000], [70]], ratio=1, heads=heads)
    check("compressed", arguments)
    expected = without_workspace("compressed", on_cuda(arguments))
    for one, another in zip(run("compressed", arguments), expected, strict=True):
        assert_bits_equal(another.cpu(), one.cpu())


@pytest.mark.parametrize(
    ("rows", "heads", "keys"), [pytest.param(2, 64, 40, marks=pytest.mark.sanitize), (16, 64, 500), (8, 128, 1100)]
)
def test_several_units_of_a_row_for_a_cta(rows, heads, keys):
    """The first of the two kernels has more units than SMs: parts of a unit take the place of the last one's."""
    arguments = on_cuda(full("compressed", [[keys - row] for row in range(rows)], ratio=1, heads=heads))
    for one, another in zip(run("compressed", arguments), without_workspace("compressed", arguments), strict=True):
        assert_bits_equal(another.cpu(), one.cpu())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [0, 3])
def test_strided_rows_and_empty_batches(kind, batch):
    arguments = full(kind, [[300, 301], [4, 5], [77, 78]])
    places = sequence_arguments(kind)
    cut = [a[:batch] if i in places else a for i, a in enumerate(arguments)]
    strided = [row_strided(a) if i in places and batch else a for i, a in enumerate(cut)]
    if batch:
        wide = torch.zeros(*cut[0].shape[:-1], FULL[0] + 8, dtype=BF16)  # rows start at multiples of 16 bytes
        wide[..., : FULL[0]] = cut[0]
        strided[0] = wide[..., : FULL[0]]
    check(kind, tuple(strided))


def test_pool_beyond_2_to_the_31_bytes():
    arguments = on_cuda(full("selected", [[1000], [255]]))
    moved = list(arguments)
    for pool_at, table_at in ((1, 5), (2, 6)):
        pool = arguments[pool_at]
        first = 2**31 // pool.shape[1] + 2
        large = torch.zeros(first + pool.shape[0], pool.shape[1], dtype=torch.uint8, device="cuda")
        large[first:] = pool
        moved[pool_at], moved[table_at] = large, arguments[table_at] + first
    for one, another in zip(OPS.sparse_attention_selected(*moved), run("selected", arguments), strict=True):
        assert_bits_equal(one.cpu(), another.cpu())


@pytest.mark.sanitize
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_kernel(kind, dtype, packed):
    positions = [[0, 1], [126, 127], [200, -1], [-1, -1]]
    arguments, _ = make(kind, positions, window=32, pages=(61, 2), k=30, dims=SMALL, packed=packed, dtype=dtype)
    check_kernel(f"sparse_attention_{kind}", arguments, PLAIN[dtype == F32])


@pytest.mark.parametrize("kind", KINDS)
def test_exact_mode_at_full_size(kind):
    arguments, _ = make(kind, [[300, 301], [9, 10]], window=128, pages=(64, 64), dims=FULL, packed=False, dtype=F32)
    check_kernel(f"sparse_attention_{kind}", arguments, PLAIN[1])
    assert_rows_independent(f"sparse_attention_{kind}", arguments, sequence_arguments(kind), rows=(0, 1))


def test_wrong_arguments_are_named():
    q, *rest = on_cuda(full("window", [[20, 21]]))
    o, lse = torch.empty_like(q), torch.empty(q.shape[:-1], device="cuda")
    out = OPS.sparse_attention_window.out
    with pytest.raises(RuntimeError, match=r"q must be rows that start at multiples of 16 bytes"):
        odd = torch.zeros(*q.shape[:-1], 513, dtype=BF16, device="cuda")[..., :512]
        out(odd, *rest, o=o, lse=lse)
    with pytest.raises(RuntimeError, match="sink must be"):
        out(q, rest[0], rest[1][:4], *rest[2:], o=o, lse=lse)
    with pytest.raises(RuntimeError, match="window_table must be a ring of at least window"):
        out(q, *rest[:-2], 2**20, rest[-1], o=o, lse=lse)
    with pytest.raises(RuntimeError, match="pool must be .*multiples of 16 bytes"):
        wide = torch.zeros(rest[0].shape[0], rest[0].shape[1] + 8, dtype=torch.uint8, device="cuda")
        out(q, wide, *rest[1:], o=o, lse=lse)
    with pytest.raises(RuntimeError, match="o must be"):
        out(q, *rest, o=o.float(), lse=lse)
