"""Quantisers fused with what comes right before them: an RMS norm, or the gated activation of an expert, of which the
`interleaved` forms take gate and up as neighbouring pairs, as products with interleaved w1 and w3 leave them.

Each reference is the literal composition of the two ops, so a fused kernel has to round where they round: the normed
row and the activation are rounded to the input's dtype and quantised from there. The normed row is an output as well,
because the router and the compressors read it. NVFP4 uses one global scale for each row: a row does not depend on its
batch.
"""

import torch
from torch import Tensor

from dsv4_ops.ops.formats import FP8
from dsv4_ops.ops.norm import expect_rms_norm, expect_swiglu, rms_norm_reference, swiglu_reference
from dsv4_ops.ops.nvfp4 import NVFP4_GROUP, nvfp4_row_scale_reference, quant_nvfp4_reference
from dsv4_ops.ops.quant import (
    MXFP4_GROUP,
    alloc_fp4,
    alloc_fp8,
    expect_fp8_groups,
    expect_groups,
    quant_fp8_reference,
    quant_mxfp4_reference,
)
from dsv4_ops.registry import Inline, define

# ---- RMS norm ----


def rms_norm_quant_fp8_reference(x: Tensor, weight: Tensor, eps: float, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """rms_norm, then quant_fp8."""
    y = rms_norm_reference(x, weight, eps)
    return y, *quant_fp8_reference(y, group)


def rms_norm_quant_mxfp4_reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """rms_norm, then quant_mxfp4."""
    y = rms_norm_reference(x, weight, eps)
    return y, *quant_mxfp4_reference(y)


def rms_norm_quant_nvfp4_reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rms_norm, nvfp4_row_scale, then quant_nvfp4."""
    y = rms_norm_reference(x, weight, eps)
    global_scale = nvfp4_row_scale_reference(y)
    return y, *quant_nvfp4_reference(y, global_scale), global_scale


def check_rms_norm_quant_fp8(x: Tensor, weight: Tensor, eps: float, group: int) -> None:
    expect_rms_norm("rms_norm_quant_fp8", x, weight)
    expect_fp8_groups("rms_norm_quant_fp8", x, group)


def check_rms_norm_quant_mxfp4(x: Tensor, weight: Tensor, eps: float) -> None:
    expect_rms_norm("rms_norm_quant_mxfp4", x, weight)
    expect_groups("rms_norm_quant_mxfp4", x, MXFP4_GROUP)


def check_rms_norm_quant_nvfp4(x: Tensor, weight: Tensor, eps: float) -> None:
    expect_rms_norm("rms_norm_quant_nvfp4", x, weight)
    expect_groups("rms_norm_quant_nvfp4", x, NVFP4_GROUP)


def alloc_nvfp4(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, block scales and one global scale a row."""
    return *alloc_fp4(rows, NVFP4_GROUP, FP8), rows.new_empty((*rows.shape[:-1], 1), dtype=torch.float32)


# x [T, K] bf16 | f32, weight [K] bf16 | f32; group 32 | 64 | 128
# -> y [T, K] of x's dtype, q [T, K] E4M3, scale [T, K/group] uint8 (UE8M0)
rms_norm_quant_fp8 = define(
    "rms_norm_quant_fp8(Tensor x, Tensor weight, float eps, int group) -> (Tensor y, Tensor q, Tensor scale)",
    alloc=lambda x, weight, eps, group: (x.new_empty(x.shape), *alloc_fp8(x, group, torch.uint8)),
    reference=rms_norm_quant_fp8_reference,
    check=check_rms_norm_quant_fp8,
    inline=Inline.ALWAYS,
)

# x [T, K] bf16 | f32, weight [K] bf16 | f32 -> y [T, K] of x's dtype, q [T, K/2] uint8, scale [T, K/32] uint8 (UE8M0)
rms_norm_quant_mxfp4 = define(
    "rms_norm_quant_mxfp4(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor q, Tensor scale)",
    alloc=lambda x, weight, eps: (x.new_empty(x.shape), *alloc_fp4(x, MXFP4_GROUP, torch.uint8)),
    reference=rms_norm_quant_mxfp4_reference,
    check=check_rms_norm_quant_mxfp4,
    inline=Inline.ALWAYS,
)

# x [T, K] bf16 | f32, weight [K] bf16 | f32
# -> y [T, K] of x's dtype, q [T, K/2] uint8, scale [T, K/16] E4M3, global_scale [T, 1] f32
rms_norm_quant_nvfp4 = define(
    "rms_norm_quant_nvfp4(Tensor x, Tensor weight, float eps) -> "
    "(Tensor y, Tensor q, Tensor scale, Tensor global_scale)",
    alloc=lambda x, weight, eps: (x.new_empty(x.shape), *alloc_nvfp4(x)),
    reference=rms_norm_quant_nvfp4_reference,
    check=check_rms_norm_quant_nvfp4,
    inline=Inline.ALWAYS,
)


# ---- gated activation ----


def swiglu_quant_fp8_reference(
    gate_up: Tensor, route_weight: Tensor, limit: float, group: int
) -> tuple[Tensor, Tensor]:
    """swiglu, then quant_fp8."""
    return quant_fp8_reference(swiglu_reference(gate_up, route_weight, limit), group)


def swiglu_quant_mxfp4_reference(gate_up: Tensor, route_weight: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """swiglu, then quant_mxfp4."""
    return quant_mxfp4_reference(swiglu_reference(gate_up, route_weight, limit))


def swiglu_quant_nvfp4_reference(gate_up: Tensor, route_weight: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """swiglu, nvfp4_row_scale, then quant_nvfp4."""
    h = swiglu_reference(gate_up, route_weight, limit)
    global_scale = nvfp4_row_scale_reference(h)
    return *quant_nvfp4_reference(h, global_scale), global_scale


def deinterleave(gate_up: Tensor) -> Tensor:
    """Pairs (gate, up) [T, 2*I] -> all gates, then all ups."""
    return torch.cat((gate_up[..., 0::2], gate_up[..., 1::2]), dim=-1)


def swiglu_interleaved_quant_fp8_reference(
    gate_up: Tensor, route_weight: Tensor, limit: float, group: int
) -> tuple[Tensor, Tensor]:
    """swiglu of pairs (gate, up), then quant_fp8."""
    return swiglu_quant_fp8_reference(deinterleave(gate_up), route_weight, limit, group)


def swiglu_interleaved_quant_mxfp4_reference(
    gate_up: Tensor, route_weight: Tensor, limit: float
) -> tuple[Tensor, Tensor]:
    """swiglu of pairs (gate, up), then quant_mxfp4."""
    return swiglu_quant_mxfp4_reference(deinterleave(gate_up), route_weight, limit)


def swiglu_interleaved_quant_nvfp4_reference(
    gate_up: Tensor, route_weight: Tensor, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """swiglu of pairs (gate, up), nvfp4_row_scale, then quant_nvfp4."""
    return swiglu_quant_nvfp4_reference(deinterleave(gate_up), route_weight, limit)


def gate_half(gate_up: Tensor) -> Tensor:
    """The half of gate_up [T, 2*I] that has the shape [T, I] of the activation."""
    return gate_up[..., : gate_up.shape[-1] // 2]


def check_swiglu_quant_fp8(op: str):
    def check(gate_up: Tensor, route_weight: Tensor, limit: float, group: int) -> None:
        expect_swiglu(op, gate_up, route_weight)
        expect_fp8_groups(op, gate_half(gate_up), group)

    return check


def check_swiglu_quant_fp4(op: str, group: int):
    def check(gate_up: Tensor, route_weight: Tensor, limit: float) -> None:
        expect_swiglu(op, gate_up, route_weight)
        expect_groups(op, gate_half(gate_up), group)

    return check


def alloc_swiglu_quant_fp8(gate_up: Tensor, route_weight: Tensor, limit: float, group: int) -> tuple[Tensor, Tensor]:
    return alloc_fp8(gate_half(gate_up), group, torch.uint8)


def alloc_swiglu_quant_mxfp4(gate_up: Tensor, route_weight: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    return alloc_fp4(gate_half(gate_up), MXFP4_GROUP, torch.uint8)


def alloc_swiglu_quant_nvfp4(gate_up: Tensor, route_weight: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    return alloc_nvfp4(gate_half(gate_up))


# gate_up [T, 2*I] bf16 | f32 (gate, then up), route_weight [T] f32; group 32 | 64 | 128
# -> q [T, I] E4M3, scale [T, I/group] uint8 (UE8M0)
swiglu_quant_fp8 = define(
    "swiglu_quant_fp8(Tensor gate_up, Tensor route_weight, float limit, int group) -> (Tensor q, Tensor scale)",
    alloc=alloc_swiglu_quant_fp8,
    reference=swiglu_quant_fp8_reference,
    check=check_swiglu_quant_fp8("swiglu_quant_fp8"),
    inline=Inline.ALWAYS,
)

# gate_up [T, 2*I] bf16 | f32 (gate, then up), route_weight [T] f32
# -> q [T, I/2] uint8, scale [T, I/32] uint8 (UE8M0)
swiglu_quant_mxfp4 = define(
    "swiglu_quant_mxfp4(Tensor gate_up, Tensor route_weight, float limit) -> (Tensor q, Tensor scale)",
    alloc=alloc_swiglu_quant_mxfp4,
    reference=swiglu_quant_mxfp4_reference,
    check=check_swiglu_quant_fp4("swiglu_quant_mxfp4", MXFP4_GROUP),
    inline=Inline.ALWAYS,
)

# gate_up [T, 2*I] bf16 | f32 (gate, then up), route_weight [T] f32
# -> q [T, I/2] uint8, scale [T, I/16] E4M3, global_scale [T, 1] f32
swiglu_quant_nvfp4 = define(
    "swiglu_quant_nvfp4(Tensor gate_up, Tensor route_weight, float limit) -> "
    "(Tensor q, Tensor scale, Tensor global_scale)",
    alloc=alloc_swiglu_quant_nvfp4,
    reference=swiglu_quant_nvfp4_reference,
    check=check_swiglu_quant_fp4("swiglu_quant_nvfp4", NVFP4_GROUP),
    inline=Inline.ALWAYS,
)

# gate_up [T, 2*I] bf16 | f32 (pairs gate, up), route_weight [T] f32; group 32 | 64 | 128
# -> q [T, I] E4M3, scale [T, I/group] uint8 (UE8M0)
swiglu_interleaved_quant_fp8 = define(
    "swiglu_interleaved_quant_fp8(Tensor gate_up, Tensor route_weight, float limit, int group) -> "
    "(Tensor q, Tensor scale)",
    alloc=alloc_swiglu_quant_fp8,
    reference=swiglu_interleaved_quant_fp8_reference,
    check=check_swiglu_quant_fp8("swiglu_interleaved_quant_fp8"),
    inline=Inline.ALWAYS,
)

# gate_up [T, 2*I] bf16 | f32 (pairs gate, up), route_weight [T] f32
# -> q [T, I/2] uint8, scale [T, I/32] uint8 (UE8M0)
swiglu_interleaved_quant_mxfp4 = define(
    "swiglu_interleaved_quant_mxfp4(Tensor gate_up, Tensor route_weight, float limit) -> (Tensor q, Tensor scale)",
    alloc=alloc_swiglu_quant_mxfp4,
    reference=swiglu_interleaved_quant_mxfp4_reference,
    check=check_swiglu_quant_fp4("swiglu_interleaved_quant_mxfp4", MXFP4_GROUP),
    inline=Inline.ALWAYS,
)

# gate_up [T, 2*I] bf16 | f32 (pairs gate, up), route_weight [T] f32
# -> q [T, I/2] uint8, scale [T, I/16] E4M3, global_scale [T, 1] f32
swiglu_interleaved_quant_nvfp4 = define(
    "swiglu_interleaved_quant_nvfp4(Tensor gate_up, Tensor route_weight, float limit) -> "
    "(Tensor q, Tensor scale, Tensor global_scale)",
    alloc=alloc_swiglu_quant_nvfp4,
    reference=swiglu_interleaved_quant_nvfp4_reference,
    check=check_swiglu_quant_fp4("swiglu_interleaved_quant_nvfp4", NVFP4_GROUP),
    inline=Inline.ALWAYS,
)
