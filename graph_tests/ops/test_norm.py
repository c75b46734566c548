"""Norms, gated activation and the window KV insert against transformers and the scalar page layout."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Experts,
    DeepseekV4RMSNorm,
    DeepseekV4UnweightedRMSNorm,
    apply_rotary_pos_emb,
)

from dsv4_ops import ops
from dsv4_ops.ops import pages
from dsv4_ops.ops.rope import rope_table
from graph_tests import checks
from graph_tests.checks import assert_bits_equal
from graph_tests.ops import scalar

EPS = 1e-6
DIM, ROPE, HEADS = 192, 64, 3  # 192 = 128 + 64: two FP8 groups
TABLE = rope_table(ROPE, 300, 1e4)
BATCHES = [0, 1, 2, 7, 64]
DTYPES = [torch.bfloat16, torch.float32]
LAYOUTS = [lambda x: x, checks.row_strided]
BF16_HALF_ULP = 2**-8 + 2**-18  # one rounding to bf16, plus what fp32 arithmetic may err before it


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rms_norm_judge(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    norm = DeepseekV4RMSNorm(x.shape[-1], EPS)
    norm.weight.data = weight
    return norm(x).detach()


def rope_judge(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x [B, S, H, D] turned by transformers' function with our table (which test_rope compares)."""
    rows = TABLE[positions.clamp_min(0).long()]
    return apply_rotary_pos_emb(x, rows[..., 0::2], rows[..., 1::2], unsqueeze_dim=2)


# ---- rms_norm ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_rms_norm_is_that_of_transformers(weight_dtype, dtype):
    x, weight = randn(2, 7, DIM, dtype=dtype) * 3, randn(DIM, dtype=weight_dtype, seed=1)
    assert_bits_equal(ops.rms_norm(x, weight, EPS), rms_norm_judge(x, weight))


def test_rms_norm_rounds_to_bf16_once():
    x, weight = randn(16, DIM, dtype=torch.bfloat16), randn(DIM, dtype=torch.bfloat16, seed=1)
    wide = x.double()
    expected = weight.double() * wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    assert ((ops.rms_norm(x, weight, EPS) - expected).abs() <= expected.abs() * BF16_HALF_ULP).all()


@pytest.mark.parametrize("width", [4096, 7168])
def test_rms_norm_of_a_row_does_not_depend_on_its_batch(width):
    """Against a batch large enough for torch to split the work."""
    x, weight = randn(64, width), randn(width, seed=1)
    many = ops.rms_norm(x, weight, EPS)
    for row in (0, 1, 63):
        assert_bits_equal(many[row : row + 1], ops.rms_norm(x[row : row + 1], weight, EPS))


def test_rms_norm_of_zeros_is_zero():
    y = ops.rms_norm(torch.zeros(2, DIM), randn(DIM), EPS)
    assert (y == 0).all()


# ---- swiglu ----


def test_swiglu_is_that_of_transformers_times_the_route_weight():
    gate_up, route_weight = randn(7, 2 * DIM) * 8, torch.rand(7, generator=torch.Generator().manual_seed(1))
    experts = SimpleNamespace(limit=10.0, act_fn=torch.nn.SiLU())
    expected = DeepseekV4Experts._apply_gate(experts, gate_up) * route_weight[:, None]
    assert_bits_equal(ops.swiglu(gate_up, route_weight, 10.0), expected)


def test_swiglu_clamps_the_gate_above_and_the_up_part_on_both_sides():
    """silu(x) = x / (1 + exp(-x)) in fp64, to the 2^-22 that an fp32 exponential and two products may err."""
    gate = torch.tensor([20.0, 20.0, -20.0, 1.0, 0.0])
    up = torch.tensor([50.0, -50.0, 3.0, 12.0, 5.0])
    h = ops.swiglu(torch.cat((gate, up))[None], torch.tensor([0.5]), 10.0)
    clamped_gate = torch.tensor([10.0, 10.0, -20.0, 1.0, 0.0], dtype=torch.float64)
    clamped_up = torch.tensor([10.0, -10.0, 3.0, 10.0, 5.0], dtype=torch.float64)
    expected = clamped_gate / (1 + (-clamped_gate).exp()) * clamped_up * 0.5
    assert ((h[0] - expected).abs() <= expected.abs() * 2**-22).all()


def test_swiglu_rounds_to_bf16_once():
    gate_up, route_weight = randn(16, 2 * DIM, dtype=torch.bfloat16) * 4, torch.rand(16) + 0.1
    gate, up = gate_up.double().chunk(2, -1)
    expected = gate / (1 + (-gate).exp()) * up * route_weight[:, None].double()
    h = ops.swiglu(gate_up, route_weight, 100.0)
    assert h.dtype == torch.bfloat16 and ((h - expected).abs() <= expected.abs() * BF16_HALF_ULP).all()


def test_swiglu_takes_a_route_weight_for_every_leading_dimension():
    gate_up, route_weight = randn(2, 3, 2 * DIM), torch.rand(2, 3)
    flat = ops.swiglu(gate_up.flatten(0, 1), route_weight.flatten(), 10.0)
    assert_bits_equal(ops.swiglu(gate_up, route_weight, 10.0).flatten(0, 1), flat)


# ---- q_norm_rope ----


def query(size: int, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """q [size, rows, H, D] and positions, different for each sequence; the first sequence lacks the last token."""
    positions = torch.arange(rows, dtype=torch.int32).repeat(size, 1)
    positions += torch.arange(size, dtype=torch.int32)[:, None] * 3 + 5
    if size and rows > 1:
        positions[0, -1] = -1
    return randn(size, rows, HEADS, DIM, dtype=dtype, seed=size) * 2, positions


@pytest.mark.parametrize("dtype", DTYPES)
def test_q_norm_rope_is_that_of_transformers_in_fp32_rounded_once(dtype):
    q, positions = query(3, 4, dtype)
    positions[2, 3] = 299
    expected = rope_judge(DeepseekV4UnweightedRMSNorm(EPS)(q.float()), positions).to(dtype)
    assert_bits_equal(ops.q_norm_rope(q, TABLE, positions, EPS), expected)


def test_q_norm_rope_of_a_row_without_a_token_is_finite():
    q, positions = query(2, 3, torch.bfloat16)
    y = ops.q_norm_rope(q, TABLE, positions.fill_(-1), EPS)
    assert_bits_equal(y, DeepseekV4UnweightedRMSNorm(EPS)(q.float()).bfloat16())  # turned as position 0: not at all


# ---- kv_norm_rope_append ----

PAGE_SIZE = 4
BLOCKS = torch.tensor([[5, 1], [0, 3], [2, 4]], dtype=torch.int32)  # ring of 8 entries
POSITIONS = torch.tensor([[6, 7, 8], [130, -1, -1], [15, 16, -1]], dtype=torch.int32)


def packed_pool(count: int = 6) -> torch.Tensor:
    return torch.full((count, pages.kv_page_bytes(PAGE_SIZE, DIM, ROPE)), 0xA5, dtype=torch.uint8)


def plain_pool(count: int = 6) -> torch.Tensor:
    return torch.full((count, PAGE_SIZE * DIM), -7.0)


def written(positions: torch.Tensor, ring: int):
    """(sequence, row, page, offset) of every row that has a token."""
    for sequence, row in enumerate(positions.tolist()):
        for index, position in enumerate(row):
            if position >= 0:
                entry = position % ring
                yield sequence, index, int(BLOCKS[sequence, entry // PAGE_SIZE]), entry % PAGE_SIZE


def append(pool: torch.Tensor, kv: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    ops.kv_norm_rope_append(pool, kv, weight, TABLE, BLOCKS, positions, EPS, PAGE_SIZE)
    return pool


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_to_a_plain_pool_is_the_kv_of_transformers_at_its_place_in_the_ring(dtype):
    kv, weight = randn(3, 3, DIM, dtype=dtype), randn(DIM, seed=1)
    roped = rope_judge(rms_norm_judge(kv, weight)[:, :, None], POSITIONS)[:, :, 0]
    expected = plain_pool()
    for sequence, index, page, offset in written(POSITIONS, 8):
        expected[page, offset * DIM : (offset + 1) * DIM] = roped[sequence, index]
    assert_bits_equal(append(plain_pool(), kv, weight, POSITIONS), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_to_a_packed_pool_quantises_the_kv_of_transformers(dtype):
    """In bf16 transformers rounds after the norm and after the rotation, as the release does."""
    kv, weight = randn(3, 3, DIM, dtype=dtype), randn(DIM, dtype=torch.bfloat16, seed=1)
    roped = rope_judge(rms_norm_judge(kv, weight)[:, :, None], POSITIONS)[:, :, 0]
    expected = packed_pool()
    data = DIM - ROPE + 2 * ROPE
    for sequence, index, page, offset in written(POSITIONS, 8):
        codes, scales = scalar.quant_fp8(roped[sequence, index, : DIM - ROPE].tolist(), 64)
        rope = roped[sequence, index, DIM - ROPE :].bfloat16().view(torch.uint8).tolist()
        expected[page, offset * data : (offset + 1) * data] = torch.tensor(codes + rope, dtype=torch.uint8)
        start = PAGE_SIZE * data + offset * 8
        expected[page, start : start + 8] = torch.tensor(scales + [0] * 6, dtype=torch.uint8)
    assert_bits_equal(append(packed_pool(), kv, weight, POSITIONS), expected)


@pytest.mark.parametrize("make_pool", [packed_pool, plain_pool])
def test_append_in_two_chunks_leaves_the_same_bytes(make_pool):
    kv, weight = randn(3, 6, DIM, dtype=torch.bfloat16), randn(DIM, seed=1)
    positions = torch.arange(6, dtype=torch.int32).repeat(3, 1) + torch.tensor([[0], [5], [250]], dtype=torch.int32)
    at_once = append(make_pool(), kv, weight, positions)
    in_two = append(make_pool(), kv[:, :2], weight, positions[:, :2])
    append(in_two, kv[:, 2:], weight, positions[:, 2:])
    assert_bits_equal(in_two, at_once)


def test_append_of_rows_without_a_token_writes_nothing():
    kv = torch.full((3, 3, DIM), torch.nan)
    pool = append(packed_pool(), kv, randn(DIM), torch.full((3, 3), -1, dtype=torch.int32))
    assert_bits_equal(pool, packed_pool())


def test_append_refuses_a_chunk_longer_than_the_ring():
    kv, positions = randn(3, 9, DIM), torch.zeros(3, 9, dtype=torch.int32)
    with pytest.raises(ValueError, match="dsv4::kv_norm_rope_append: 9 rows .* ring of 8: split the chunk"):
        append(plain_pool(), kv, randn(DIM), positions)


def test_append_refuses_a_page_that_is_too_small():
    for pool in (packed_pool()[:, 100:], plain_pool()[:, 100:]):
        with pytest.raises(ValueError, match="dsv4::kv_norm_rope_append: pool must be .* page stride >= "):
            append(pool, randn(3, 1, DIM), randn(DIM), torch.zeros(3, 1, dtype=torch.int32))


# ---- contracts ----


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "row_strided"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", BATCHES)
def test_op_contract(size, dtype, layout):
    weight = randn(DIM, dtype=dtype)
    checks.check_op("rms_norm", (layout(randn(size, DIM, dtype=dtype)), weight, EPS))
    checks.check_op("swiglu", (layout(randn(size, 2 * DIM, dtype=dtype)), torch.rand(size), 10.0))
    for rows in (1, 3):
        q, positions = query(size, rows, dtype)
        checks.check_op("q_norm_rope", (layout(q), TABLE, positions, EPS))


def append_arguments(size: int, rows: int, dtype: torch.dtype, pool, layout=lambda x: x) -> tuple:
    kv, positions = query(size, rows, dtype)
    blocks = torch.arange(2 * size, dtype=torch.int32).view(size, 2)
    return pool, layout(kv[:, :, 0].contiguous()), randn(DIM), TABLE, blocks, positions, EPS, PAGE_SIZE


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "row_strided"])
@pytest.mark.parametrize("make_pool", [packed_pool, plain_pool])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 2, 7])
def test_append_contract(size, dtype, make_pool, layout):
    for rows in (1, 3):
        arguments = append_arguments(size, rows, dtype, make_pool(2 * size + 1), layout)
        checks.check_op("kv_norm_rope_append", arguments)
        if size:
            checks.assert_mutates("kv_norm_rope_append", (make_pool(2 * size + 1), *arguments[1:]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_give_the_same_bits(dtype):
    x, weight = randn(6, 2 * DIM, dtype=dtype), randn(2 * DIM)
    q, positions = query(2, 3, dtype)
    for strided in (checks.row_strided(x), x.t().contiguous().t()):
        assert_bits_equal(ops.rms_norm(strided, weight, EPS), ops.rms_norm(x, weight, EPS))
        assert_bits_equal(ops.swiglu(strided, torch.ones(6), 10.0), ops.swiglu(x, torch.ones(6), 10.0))
    for strided in (checks.row_strided(q), q.transpose(1, 2).contiguous().transpose(1, 2)):
        y = ops.q_norm_rope(strided, TABLE, positions, EPS)
        assert y.is_contiguous()
        assert_bits_equal(y, ops.q_norm_rope(q, TABLE, positions, EPS))


def test_no_guard_on_the_batch():
    checks.check_symbolic_batch("rms_norm", lambda size: (randn(size, DIM), randn(DIM), EPS))
    checks.check_symbolic_batch("swiglu", lambda size: (randn(size, DIM), torch.ones(size), 10.0))
    queries, positions = query(5, 3, torch.bfloat16)  # check_symbolic_batch asks for a batch of 5
    checks.check_symbolic_batch("q_norm_rope", lambda size: (queries[:size], TABLE, positions[:size], EPS))
    checks.check_symbolic_batch(
        "kv_norm_rope_append", lambda size: append_arguments(size, 3, torch.bfloat16, packed_pool(2 * size + 1))
    )


def test_opcheck():
    q, positions = query(2, 3, torch.bfloat16)
    checks.opcheck("rms_norm", (randn(3, DIM), randn(DIM), EPS))
    checks.opcheck("swiglu", (randn(3, DIM), torch.ones(3), 10.0))
    checks.opcheck("q_norm_rope", (q, TABLE, positions, EPS))
    checks.opcheck("kv_norm_rope_append", append_arguments(2, 3, torch.bfloat16, packed_pool(5)))


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("rms_norm", (torch.zeros(2, 8), torch.zeros(4), EPS), r"weight must be \[..., 8\].*got \[4\] float32"),
        ("rms_norm", (torch.zeros(2, 8, dtype=torch.int32), torch.zeros(8), EPS), "x must be .*got .* int32"),
        ("swiglu", (torch.zeros(2, 7), torch.zeros(2), 1.0), r"\[T, 2\*I\], gate then up, got \[2, 7\]"),
        ("swiglu", (torch.zeros(2, 8), torch.zeros(2, 1), 1.0), "route_weight .* ones for a shared expert"),
        ("q_norm_rope", (torch.zeros(2, 3, 8), TABLE, torch.zeros(2, 3).int(), EPS), r"q must be \[B, S, H, D\]"),
        ("q_norm_rope", (torch.zeros(2, 3, 1, 8), TABLE, torch.zeros(2, 3).int(), EPS), "R even and at most 8"),
        ("q_norm_rope", (torch.zeros(2, 3, 1, 64), TABLE, torch.zeros(2, 3), EPS), r"positions must be \[B, S\] int32"),
    ],
)
def test_refuses_by_name_what_does_not_fit(name, arguments, message):
    with pytest.raises(ValueError, match=f"dsv4::{name}: .*{message}"):
        getattr(ops, name)(*arguments)
