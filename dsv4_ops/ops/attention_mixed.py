"""Sparse attention with queries in two parts: E4M3 codes with one scale for each vector, and rope dimensions in BF16.

Scores of all but the rope dimensions are products of E4M3 codes, of the queries' and of those that the pools hold,
which must not be NaN codes; rope dimensions, weights and output are BF16 as in `sparse_attention_selected`. What
rounding the queries costs, in this reference against the same keys and queries in BF16 (N(0, 1), 448 + 64 dimensions,
64 heads; 640 and 1152 keys alike): o is off by 2.5 % of its root mean square, a cosine distance of 3e-4, where rounding
o to BF16 costs 0.17 %; lse is off by 2.4e-3 in the root mean square and by at most 9e-3.
`graph_tests/ops/test_attention_mixed.py` holds it to that. The kernel multiplies codes as the BF16 values that they
are, which is exact, and adds up in fp32.
"""

import torch
from torch import Tensor

from dsv4_ops.ops.attention import check_selected, selected_reference
from dsv4_ops.ops.formats import E4M3_MAX, FP8, FP8_AMAX_FLOOR, cast_e4m3
from dsv4_ops.registry import Inline, define, describe, expect


def split_queries(q: Tensor, rope_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [..., D] -> operands of the op: codes [..., D - R], scale max(amax, 1e-4) / 448 [...] f32, rope [..., R]."""
    nope, rope = q[..., :-rope_dim].float(), q[..., -rope_dim:]
    scale = nope.abs().amax(-1).clamp_min(FP8_AMAX_FLOOR) / E4M3_MAX
    return cast_e4m3(nope / scale[..., None]), scale, rope.to(torch.bfloat16)


def mixed_reference(q_nope: Tensor, q_scale: Tensor, q_rope: Tensor, *others) -> tuple[Tensor, Tensor]:
    """sparse_attention_selected for the queries that codes, scales and rope dimensions stand for."""
    q = torch.cat((q_nope.float() * q_scale[..., None], q_rope.float()), -1)
    o, lse = selected_reference(q, *others)
    return o.to(torch.bfloat16), lse


def check_mixed(q_nope: Tensor, q_scale: Tensor, q_rope: Tensor, *others) -> None:
    window_pool, pool = others[:2]
    op = "sparse_attention_mixed"
    fits = q_nope.dim() == 4 and q_nope.dtype == FP8
    expect(fits, op, f"q_nope must be [B, S, H, D - R] float8_e4m3fn, got {describe(q_nope)}")
    tokens, heads = q_nope.shape[1:3]
    fits = q_scale.dim() == 3 and q_scale.shape[1:] == (tokens, heads) and q_scale.dtype == torch.float32
    expect(fits, op, f"q_scale must be [B, {tokens}, {heads}] float32, got {describe(q_scale)}")
    fits = q_rope.dim() == 4 and q_rope.shape[1:3] == (tokens, heads) and q_rope.dtype == torch.bfloat16
    expect(fits, op, f"q_rope must be [B, {tokens}, {heads}, R] bfloat16, got {describe(q_rope)}")
    packed = window_pool.dtype == pool.dtype == torch.uint8
    expect(packed, op, f"pools must be packed (uint8), got {describe(window_pool)} and {describe(pool)}")
    check_selected(op, alloc_mixed(q_nope, q_scale, q_rope)[0], *others)


def alloc_mixed(q_nope: Tensor, q_scale: Tensor, q_rope: Tensor, *others) -> tuple[Tensor, Tensor]:
    dim = q_nope.shape[-1] + q_rope.shape[-1]
    return q_rope.new_empty((*q_nope.shape[:-1], dim)), q_nope.new_empty(q_nope.shape[:-1], dtype=torch.float32)


# q_nope [B, S, H, D - R] E4M3, q_scale [B, S, H] f32, q_rope [B, S, H, R] bf16, of any strides but the last; the rest
# as in sparse_attention_selected, with packed pools -> o [B, S, H, D] bf16, lse [B, S, H] f32
sparse_attention_mixed = define(
    "sparse_attention_mixed(Tensor q_nope, Tensor q_scale, Tensor q_rope, Tensor window_pool, Tensor compressed_pool, "
    "Tensor sink, Tensor rope_table, Tensor window_table, Tensor compressed_table, Tensor indices, Tensor positions, "
    "int window, int window_page_size, int compressed_page_size) -> (Tensor o, Tensor lse)",
    alloc=alloc_mixed,
    reference=mixed_reference,
    check=check_mixed,
    inline=Inline.STATIC_SHAPES,
)
