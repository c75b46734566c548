"""qkv_norm_rope_append against the two ops that it does at once."""

import pytest
import torch

from dsv4_ops import ops
from graph_tests import checks
from graph_tests.checks import assert_bits_equal
from graph_tests.ops.test_norm import DIM, DTYPES, EPS, LAYOUTS, TABLE, append_arguments, packed_pool, plain_pool, query

NAME = "qkv_norm_rope_append"
POOLS = [packed_pool, plain_pool]


def arguments(size: int, rows: int, dtype: torch.dtype, make_pool=packed_pool, layout=lambda x: x) -> tuple:
    """Heads and a window row for each token; the first sequence lacks the last token."""
    pool, *others = append_arguments(size, rows, dtype, make_pool(2 * size + 1), layout)
    return pool, layout(query(size, rows, dtype)[0]), *others


@pytest.mark.parametrize("make_pool", POOLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_both_ops(dtype, make_pool):
    pool, q, kv, weight, table, blocks, positions, eps, page_size = arguments(3, 4, dtype, make_pool)
    expected_q, expected_pool = ops.q_norm_rope(q, table, positions, eps), pool.clone()
    ops.kv_norm_rope_append(expected_pool, kv, weight, table, blocks, positions, eps, page_size)
    ops.qkv_norm_rope_append(pool, q, kv, weight, table, blocks, positions, eps, page_size)
    assert_bits_equal(q, expected_q)
    assert_bits_equal(pool, expected_pool)


def test_heads_are_written_through_a_view():
    """The model passes a view of a projection's output."""
    pool, q, *others = arguments(2, 3, torch.bfloat16)
    flat, expected = q.flatten(2).clone(), ops.q_norm_rope(q, TABLE, others[4], EPS)
    ops.qkv_norm_rope_append(pool, flat.unflatten(-1, q.shape[2:]), *others)
    assert_bits_equal(flat, expected.flatten(2))


def test_rows_without_a_token_write_no_entry():
    pool, q, kv, *others = arguments(2, 3, torch.bfloat16)
    before = pool.clone()
    others[3].fill_(-1)
    ops.qkv_norm_rope_append(pool, q, torch.full_like(kv, torch.nan), *others)
    assert_bits_equal(pool, before)
    assert torch.isfinite(q).all()


@torch.no_grad()
@pytest.mark.parametrize("make_pool", POOLS)
def test_a_compiled_graph_copies_neither_pool_nor_heads(make_pool):
    """The heads are a view of what another op has made: functionalisation must find that it can write there."""
    pool, q, *others = arguments(2, 3, torch.bfloat16, make_pool)
    x, weight = torch.randn(2, 3, 16).bfloat16(), torch.randn(q.shape[2] * q.shape[3], 16).bfloat16()

    def function(pool, x):
        heads = ops.linear_dense(x, weight).unflatten(-1, q.shape[2:])
        ops.qkv_norm_rope_append(pool, heads, *others)
        return heads * 2

    torch._dynamo.reset()
    expected_pool = pool.clone()
    expected = function(expected_pool, x)
    compiled = torch.compile(function, backend="dsv4", fullgraph=True)
    actual, (code,) = torch._inductor.utils.run_and_get_code(compiled, pool, x)
    assert_bits_equal(actual, expected)
    assert_bits_equal(pool, expected_pool)
    call = code.split("def call(")[1].split("def benchmark_compiled_module")[0]
    assert "clone" not in call and "copy_(" not in call


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "row_strided"])
@pytest.mark.parametrize("make_pool", POOLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 2, 7])
def test_contract(size, dtype, make_pool, layout):
    for rows in (1, 3):
        checks.check_op(NAME, arguments(size, rows, dtype, make_pool, layout))
        if size:
            checks.assert_mutates(NAME, arguments(size, rows, dtype, make_pool))


def test_no_guard_on_the_batch():
    checks.check_symbolic_batch(NAME, lambda size: arguments(size, 3, torch.bfloat16))


def test_opcheck():
    checks.opcheck(NAME, arguments(2, 3, torch.bfloat16))


@pytest.mark.parametrize(
    "place, change, message",
    [
        (1, lambda q: q[..., 0], r"q must be \[B, S, H, D\], got \[2, 3, 3\]"),
        (1, lambda q: q.int(), "q must be .*got .* int32"),
        (2, lambda kv: kv.float(), rf"kv must be \[B, S, {DIM}\] bfloat16 like q .*, got \[2, 3, {DIM}\] float32"),
        (2, lambda kv: kv.repeat(1, 3, 1), "9 rows .* ring of 8: split the chunk"),
        (3, lambda weight: weight[1:], rf"weight must be \[..., {DIM}\]"),
        (6, lambda positions: positions.long(), r"positions must be \[B, S\] int32"),
    ],
)
def test_refuses_by_name_what_does_not_fit(place, change, message):
    given = list(arguments(2, 3, torch.bfloat16))
    given[place] = change(given[place])
    with pytest.raises(ValueError, match=f"dsv4::{NAME}: .*{message}"):
        ops.qkv_norm_rope_append(*given)
