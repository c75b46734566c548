"""Queries of the lightning indexer, in the form of the index keys that indexer.py compares them with.

They are rotated (RoPE), in the packed formats also by a Hadamard transform, and quantised like the keys: FP8 with one
scale for each head, folded into w (it is positive, so the score's relu lets it through), or FP4 with a UE8M0 scale for
each group of 32. The transform is orthogonal: left out on both sides it changes scores only through the rounding, left
out on one side it scrambles them. The plain form, for exact mode, neither transforms nor quantises.

Shapes: q [B, S, Hi, Di] bf16|f32, weights [B, S, Hi] bf16|f32 (output of their projection; rounded to the dtype of q),
rope_table f32 [max_pos, R], positions int32 [B, S], w f32 [B, S, Hi] = weights * Di^-0.5 * Hi^-0.5.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dsv4_ops.ops import pages
from dsv4_ops.ops.formats import FP8, hadamard
from dsv4_ops.ops.norm import expect_activation, expect_rope
from dsv4_ops.ops.quant import quant_fp8_fp32_scale_reference, quant_mxfp4_reference
from dsv4_ops.ops.rope import apply_rope
from dsv4_ops.registry import Inline, define, describe, expect


def _scaled_weights(q: Tensor, weights: Tensor) -> Tensor:
    heads, dim = q.shape[-2:]
    return weights.to(q.dtype).float() * (dim**-0.5 * heads**-0.5)


def _rotated_query(q: Tensor, rope_table: Tensor, positions: Tensor) -> Tensor:
    """RoPE, then Hadamard, each rounded to bf16 like the index keys."""
    roped = apply_rope(q.to(torch.bfloat16).float(), rope_table, positions).to(torch.bfloat16)
    return hadamard(roped.float()).to(torch.bfloat16)


def index_query_plain_reference(q: Tensor, weights: Tensor, rope_table: Tensor, positions: Tensor):
    """Index queries in fp32: RoPE; scaled head weights."""
    return apply_rope(q.float(), rope_table, positions).contiguous(), _scaled_weights(q, weights).contiguous()


def index_query_fp8_reference(q: Tensor, weights: Tensor, rope_table: Tensor, positions: Tensor):
    """Index queries in FP8: RoPE, Hadamard, E4M3 with the scale folded into the head weights."""
    q8, scale = quant_fp8_fp32_scale_reference(_rotated_query(q, rope_table, positions), q.shape[-1])
    return q8, (_scaled_weights(q, weights) * scale[..., 0]).contiguous()


def index_query_fp4_reference(q: Tensor, weights: Tensor, rope_table: Tensor, positions: Tensor):
    """Index queries in FP4: RoPE, Hadamard, E2M1 with a UE8M0 scale for each group of 32; scaled head weights."""
    q4, scale = quant_mxfp4_reference(_rotated_query(q, rope_table, positions))
    return q4, scale, _scaled_weights(q, weights).contiguous()


def _check_query(op: str, q: Tensor, weights: Tensor, rope_table: Tensor, positions: Tensor) -> None:
    expect_activation(q, op, "q")
    expect(q.dim() == 4, op, f"q must be [B, S, Hi, Di], got {describe(q)}")
    expect_activation(weights, op, "weights", q.shape[2])
    expect(weights.dim() == 3, op, f"weights must be [B, S, {q.shape[2]}], got {describe(weights)}")
    expect_rope(op, q, rope_table, positions)
    dim = q.shape[-1]
    transforms = dim & (dim - 1) == 0 and dim % pages.INDEX_GROUP == 0
    wanted = f"Di must be a power of two and a multiple of {pages.INDEX_GROUP}"
    expect(op == "index_query_plain" or transforms, op, f"{wanted}, got {dim}")


def _alloc_query_plain(q: Tensor, weights: Tensor, rope_table: Tensor, positions: Tensor):
    return q.new_empty(q.shape, dtype=torch.float32), weights.new_empty(weights.shape, dtype=torch.float32)


def _alloc_query_fp8(q: Tensor, weights: Tensor, rope_table: Tensor, positions: Tensor):
    return q.new_empty(q.shape, dtype=FP8), weights.new_empty(weights.shape, dtype=torch.float32)


def _alloc_query_fp4(q: Tensor, weights: Tensor, rope_table: Tensor, positions: Tensor):
    *rows, dim = q.shape
    codes, scale = (q.new_empty((*rows, size), dtype=torch.uint8) for size in (dim // 2, dim // pages.INDEX_GROUP))
    return codes, scale, weights.new_empty(weights.shape, dtype=torch.float32)


def _define_query(form: str, outputs: str, alloc: Callable, reference: Callable):
    name = f"index_query_{form}"
    return define(
        f"{name}(Tensor q, Tensor weights, Tensor rope_table, Tensor positions) -> ({outputs})",
        alloc=alloc,
        reference=reference,
        check=partial(_check_query, name),
        inline=Inline.ALWAYS,
    )


# y f32 [B, S, Hi, Di], not transformed
index_query_plain = _define_query("plain", "Tensor y, Tensor w", _alloc_query_plain, index_query_plain_reference)
# q8 E4M3 [B, S, Hi, Di]; w carries the scale max(amax, 1e-4) / 448 of each head
index_query_fp8 = _define_query("fp8", "Tensor q8, Tensor w", _alloc_query_fp8, index_query_fp8_reference)
# q4 uint8 [B, S, Hi, Di / 2], scale uint8 [B, S, Hi, Di / 32]
index_query_fp4 = _define_query("fp4", "Tensor q4, Tensor scale, Tensor w", _alloc_query_fp4, index_query_fp4_reference)
