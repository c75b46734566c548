"""Sparse attention against a sum over explicitly listed keys in fp64, and against transformers.

Pools start out as NaN everywhere; only entries that some row may see are filled in, byte by byte from the page layout.
Positions lie under B = one sequence each, so that one call covers many of them.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers.models.deepseek_v4.modeling_deepseek_v4 import apply_rotary_pos_emb, eager_attention_forward

import dsv4_ops.ops.attention  # noqa: F401
from graph_tests import checks
from graph_tests.ops.attention_cases import FULL, SMALL, make, rope_table

OPS = torch.ops.dsv4
KINDS = ["window", "selected", "compressed"]
F32, BF16 = torch.float32, torch.bfloat16


def judge(arguments: tuple, keys: list, positions: list[list[int]], dims: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """o and lse in fp64, key by key as listed."""
    q, sink = arguments[0].double(), next(a for a in arguments[1:] if a.dim() == 1).double()
    table = rope_table(dims[1]).double()
    o, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    for b, row in enumerate(positions):
        for s, position in enumerate(row):
            if not keys[b][s]:
                continue
            listed = torch.stack(keys[b][s])
            score = q[b, s] @ listed.T / math.sqrt(dims[0])
            lse[b, s] = score.logsumexp(-1)
            share = 1 / (1 + (sink - lse[b, s]).exp())  # of the keys in the denominator
            o[b, s] = score.softmax(-1) @ listed * share[:, None]
            pairs = torch.view_as_complex(o[b, s, :, dims[0] - dims[1] :].unflatten(-1, (-1, 2)).contiguous())
            turn = torch.view_as_complex(table[max(position, 0)].view(-1, 2)).conj()
            o[b, s, :, dims[0] - dims[1] :] = torch.view_as_real(pairs * turn).flatten(-2)
    return o, lse


def assert_close(o: torch.Tensor, lse: torch.Tensor, expected_o: torch.Tensor, expected_lse: torch.Tensor) -> None:
    """Scores are sums of up to 512 fp32 products of size about 1, over sqrt(D): off by sqrt(512) * 2^-24 = 1.4e-6 each,
    and exp turns that into a relative error of the weights. Keys are below 16. bf16 adds one rounding, 2^-8."""
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
    finite = expected_lse > -torch.inf
    torch.testing.assert_close(lse[finite].double(), expected_lse[finite], rtol=1e-6, atol=1e-5)
    rtol = 2.0**-8 if o.dtype == BF16 else 1e-5
    torch.testing.assert_close(o.double(), expected_o, rtol=rtol, atol=2e-5)


def check(kind: str, positions: list[list[int]], **options) -> tuple[torch.Tensor, torch.Tensor]:
    arguments, keys = make(kind, positions, **options)
    o, lse = getattr(OPS, f"sparse_attention_{kind}")(*arguments)
    assert o.dtype == arguments[0].dtype and lse.dtype == F32
    assert_close(o, lse, *judge(arguments, keys, positions, options.get("dims", SMALL)))
    return o, lse


def rows_from(start: int, rows: int) -> list[int]:
    return list(range(start, start + rows))


@pytest.mark.parametrize("packed", [True, False])
def test_window_of_128_at_its_boundaries(packed):
    positions = [[position] for position in (0, 1, 126, 127, 128, 129, 130)]
    check("window", positions, window=128, pages=(64, 3), packed=packed)


@pytest.mark.parametrize("page_size", [2, 61, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_ring_wraps(kind, page_size):
    check(kind, [[1000], [1001], [127], [255]], window=128, ratio=128, pages=(page_size, page_size))


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_several_query_rows(kind, rows):
    check(kind, [rows_from(start, rows) for start in (0, 3, 14, 29, 500)])


@pytest.mark.parametrize("kind", KINDS)
def test_chunk_longer_than_a_block_of_rows(kind):
    check(kind, [rows_from(0, 140), rows_from(77, 140)], k=40)


@pytest.mark.parametrize("kind", KINDS)
def test_ring_longer_than_needed(kind):
    check(kind, [[40, 41], [3, 4]], ring=64)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_rows_are_zero(kind):
    positions = [[7, 8, -1, -1], [-1, -1, -1, -1], [20, 21, 22, 23], [0, -1, -1, -1]]
    o, lse = check(kind, positions)
    empty = torch.tensor(positions) < 0
    assert (o[empty] == 0).all() and (lse[empty] == -torch.inf).all()


@pytest.mark.parametrize(("ratio", "positions"), [(4, (0, 2, 3, 4, 6, 7, 8)), (128, (126, 127, 128, 254, 255, 256))])
def test_compressed_entry_is_visible_from_the_last_position_of_its_block(ratio, positions):
    check("compressed", [[position] for position in positions], ratio=ratio)


def test_a_row_of_a_chunk_sees_the_entries_complete_at_its_own_position():
    check("compressed", [rows_from(0, 9), rows_from(2, 9)])


def test_negative_index_is_skipped_anywhere():
    """Every slot of the indices is -1 for some row: the builder scatters the chosen entries over the slots."""
    arguments, _ = make("selected", [rows_from(3, 8)], k=6)
    assert (arguments[7] < 0).any(1).all() and (arguments[7] >= 0).any()
    check("selected", [rows_from(3, 8)], k=6)


def test_selected_without_any_index_is_the_window():
    arguments, keys = make("selected", [[30, 31]])
    arguments[7].fill_(-1)
    keys = [[row[:16] for row in sequence] for sequence in keys]  # the window comes first
    assert_close(*OPS.sparse_attention_selected(*arguments), *judge(arguments, keys, [[30, 31]], SMALL))


@pytest.mark.parametrize("kind", KINDS)
def test_sink_of_infinity(kind):
    """-inf is a softmax without sink, +inf leaves nothing for the keys; lse does not contain the sink."""
    sink = torch.tensor([-torch.inf, torch.inf, 0.0, 100.0, -100.0, 30.0, -torch.inf, torch.inf])
    o, _ = check(kind, [[0], [40], [-1]], sink=sink)
    assert (o[:, :, [1, 7]] == 0).all() and o.isfinite().all()


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("heads", [8, 16, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_head_counts_at_full_size(kind, heads, dtype):
    check(kind, [[300, 301], [9, 10]], heads=heads, dims=FULL, window=128, pages=(64, 64), dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_large_scores_do_not_overflow(kind):
    arguments, keys = make(kind, [[40], [3]], packed=False)
    arguments = (arguments[0] * 300, *arguments[1:])
    o, lse = getattr(OPS, f"sparse_attention_{kind}")(*arguments)
    expected_o, expected_lse = judge(arguments, keys, [[40], [3]], SMALL)
    # sum|q k| / sqrt(D) is about 2000 here, and fp32 sums of 80 terms are off by at most 80 * 2^-24 of that: 1e-2;
    # their random walk is a tenth of it. Weights are off by the same factor.
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-3)
    torch.testing.assert_close(o.double(), expected_o, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind):
    """DeepseekV4Attention: eager attention with sinks over the listed keys, then the conjugate rotation."""
    positions, (head_dim, rope_dim) = [rows_from(6, 5)], SMALL
    arguments, keys = make(kind, positions, packed=False)
    q, sink = arguments[0], next(a for a in arguments[1:] if a.dim() == 1)
    columns = torch.cat([torch.stack(row) for row in keys[0]]).float()[None, None]
    owner = torch.repeat_interleave(torch.arange(5), torch.tensor([len(row) for row in keys[0]]))
    mask = torch.where(owner == torch.arange(5)[:, None], 0.0, -torch.inf)
    module = SimpleNamespace(num_key_value_groups=q.shape[2], sinks=sink, training=False)
    o, _ = eager_attention_forward(module, q.transpose(1, 2), columns, columns, mask, head_dim**-0.5)
    table = rope_table(rope_dim)[torch.tensor(positions)]
    expected = apply_rotary_pos_emb(o.transpose(1, 2), table[..., 0::2], -table[..., 1::2]).transpose(1, 2)
    # both compute in fp32; the sums run over another number of (masked) keys
    torch.testing.assert_close(getattr(OPS, f"sparse_attention_{kind}")(*arguments)[0], expected, rtol=1e-5, atol=1e-6)


def contract_arguments(kind: str, batch: int, dtype: torch.dtype = BF16, packed: bool = True) -> tuple:
    arguments, _ = make(kind, [[20 + b, 21 + b] for b in range(max(batch, 1))], dtype=dtype, packed=packed)
    per_sequence = [a.dim() == 4 or a.dtype == torch.int32 for a in arguments if isinstance(a, torch.Tensor)]
    per_sequence += [False] * (len(arguments) - len(per_sequence))
    return tuple(a[:batch] if ours else a for a, ours in zip(arguments, per_sequence, strict=True))


@pytest.mark.parametrize("batch", [0, 1, 2, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind, batch):
    for dtype, packed in ((BF16, True), (F32, False)):
        arguments = contract_arguments(kind, batch, dtype, packed)
        checks.check_op(f"sparse_attention_{kind}", arguments)
        strided = tuple(checks.row_strided(a) if isinstance(a, torch.Tensor) and a.dim() > 1 else a for a in arguments)
        strided = (*strided[:1], *arguments[1:2], *strided[2:])
        checks.check_op(f"sparse_attention_{kind}", strided)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_arguments_give_the_same_bits(kind):
    arguments, _ = make(kind, [[20, 21], [3, 4]])
    strided = tuple(checks.row_strided(a) if isinstance(a, torch.Tensor) and a.dim() > 1 else a for a in arguments)
    op = getattr(OPS, f"sparse_attention_{kind}")
    for actual, expected in zip(op(*strided), op(*arguments), strict=True):
        checks.assert_bits_equal(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_no_guard_on_the_batch(kind):
    checks.check_symbolic_batch(f"sparse_attention_{kind}", lambda batch: contract_arguments(kind, batch))
    checks.opcheck(f"sparse_attention_{kind}", contract_arguments(kind, 3))


def test_wrong_arguments_are_named():
    (q, *rest), _ = make("window", [[20, 21]])
    with pytest.raises(ValueError, match="ring of 20 entries is shorter than window"):
        OPS.sparse_attention_window(q, *rest[:5], 32, 5)
    with pytest.raises(ValueError, match="sink must be"):
        OPS.sparse_attention_window(q, rest[0], rest[1][:4], *rest[2:])
    with pytest.raises(ValueError, match="window_pool must be"):
        OPS.sparse_attention_window(q, rest[0][:, :64], *rest[1:])
    (q, *rest), _ = make("selected", [[20, 21]])
    with pytest.raises(ValueError, match="indices must be"):
        OPS.sparse_attention_selected(q, *rest[:6], rest[6].long(), *rest[7:])
