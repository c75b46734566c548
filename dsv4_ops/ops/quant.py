"""Quantisers of activations with a scale for each group of a row, and their inverses: FP8 and MXFP4."""

import torch
from torch import Tensor

from dsv4_ops.ops.formats import (
    E4M3_MAX,
    FP8,
    FP8_AMAX_FLOOR,
    cast_e4m3,
    decode_e2m1,
    decode_ue8m0,
    encode_e2m1,
    fp8_group_scale,
    mxfp4_group_scale,
    pack_e2m1,
    unpack_e2m1,
)
from dsv4_ops.registry import Inline, define, describe, expect

FP8_GROUPS = (32, 64, 128)
MXFP4_GROUP = 32


def expect_groups(op: str, x: Tensor, group: int) -> None:
    """Raise unless x is [T, K] bf16 or fp32 with K a multiple of `group`."""
    fits = x.dim() >= 1 and x.dtype in (torch.bfloat16, torch.float32) and x.shape[-1] % group == 0
    expect(fits, op, f"x must be [T, K] bfloat16 or float32 with K a multiple of {group}, got {describe(x)}")


def row_amax(x: Tensor) -> Tensor:
    """Largest magnitude of the last dimension, fp32."""
    return x.float().abs().amax(-1)


# ---- FP8 ----


def quant_fp8_reference(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """E4M3 codes and, for each group, the UE8M0 byte of 2^ceil(log2(max(amax, 1e-4) / 448))."""
    groups = x.float().contiguous().unflatten(-1, (-1, group))
    scale = fp8_group_scale(row_amax(groups))
    return cast_e4m3(groups / decode_ue8m0(scale)[..., None]).flatten(-2), scale


def quant_fp8_fp32_scale_reference(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """E4M3 codes and the fp32 scale max(amax, 1e-4) / 448 of each group."""
    groups = x.float().contiguous().unflatten(-1, (-1, group))
    scale = row_amax(groups).clamp_min(FP8_AMAX_FLOOR) / E4M3_MAX
    return cast_e4m3(groups / scale[..., None]).flatten(-2), scale


def dequant_fp8_reference(q: Tensor, scale: Tensor) -> Tensor:
    """Codes times the scale of their group."""
    groups = q.float().contiguous().unflatten(-1, (scale.shape[-1], -1))
    scale = decode_ue8m0(scale) if scale.dtype == torch.uint8 else scale
    return (groups * scale[..., None]).flatten(-2)


def expect_fp8_groups(op: str, x: Tensor, group: int) -> None:
    """Raise unless FP8 has groups of this size and they fill the rows of x."""
    expect(group in FP8_GROUPS, op, f"group must be one of {FP8_GROUPS}, got {group}")
    expect_groups(op, x, group)


def check_dequant_fp8(q: Tensor, scale: Tensor) -> None:
    fits = q.dtype == FP8 and scale.dtype in (torch.uint8, torch.float32) and q.shape[-1] % scale.shape[-1] == 0
    wanted = "q [T, K] float8_e4m3fn and scale [T, K/group] uint8 or float32"
    expect(fits, "dequant_fp8", f"expected {wanted}, got {describe(q)} and {describe(scale)}")


def alloc_fp8(x: Tensor, group: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """E4M3 codes like x, and one scale for each group."""
    scale_shape = (*x.shape[:-1], x.shape[-1] // group)
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(scale_shape, dtype=scale_dtype)


# x [T, K] bf16 | f32; group 32 | 64 | 128 -> q [T, K] E4M3, scale [T, K/group] uint8 (UE8M0)
quant_fp8 = define(
    "quant_fp8(Tensor x, int group) -> (Tensor q, Tensor scale)",
    alloc=lambda x, group: alloc_fp8(x, group, torch.uint8),
    reference=quant_fp8_reference,
    check=lambda x, group: expect_fp8_groups("quant_fp8", x, group),
    inline=Inline.ALWAYS,
)

# x [T, K] bf16 | f32; group 32 | 64 | 128 -> q [T, K] E4M3, scale [T, K/group] f32
quant_fp8_fp32_scale = define(
    "quant_fp8_fp32_scale(Tensor x, int group) -> (Tensor q, Tensor scale)",
    alloc=lambda x, group: alloc_fp8(x, group, torch.float32),
    reference=quant_fp8_fp32_scale_reference,
    check=lambda x, group: expect_fp8_groups("quant_fp8_fp32_scale", x, group),
    inline=Inline.ALWAYS,
)

# q [T, K] E4M3, scale [T, K/group] uint8 (UE8M0) | f32 -> x [T, K] f32
dequant_fp8 = define(
    "dequant_fp8(Tensor q, Tensor scale) -> (Tensor x)",
    alloc=lambda q, scale: q.new_empty(q.shape, dtype=torch.float32),
    reference=dequant_fp8_reference,
    check=check_dequant_fp8,
    inline=Inline.ALWAYS,
)


# ---- MXFP4 ----


def quant_mxfp4_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """E2M1 codes, two a byte, and the UE8M0 byte of 2^ceil(log2(max(amax, 6 * 2^-126) / 6)) for each group of 32."""
    groups = x.float().contiguous().unflatten(-1, (-1, MXFP4_GROUP))
    scale = mxfp4_group_scale(row_amax(groups))
    return pack_e2m1(encode_e2m1(groups / decode_ue8m0(scale)[..., None]).flatten(-2)), scale


def dequant_mxfp4_reference(q: Tensor, scale: Tensor) -> Tensor:
    """Codes times the scale of their group of 32."""
    groups = decode_e2m1(unpack_e2m1(q)).unflatten(-1, (-1, MXFP4_GROUP))
    return (groups * decode_ue8m0(scale)[..., None]).flatten(-2)


def check_dequant_mxfp4(q: Tensor, scale: Tensor) -> None:
    fits = q.dtype == scale.dtype == torch.uint8 and q.shape[-1] * 2 == scale.shape[-1] * MXFP4_GROUP
    wanted = "q [T, K/2] uint8 and scale [T, K/32] uint8"
    expect(fits, "dequant_mxfp4", f"expected {wanted}, got {describe(q)} and {describe(scale)}")


def alloc_fp4(x: Tensor, group: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Packed codes of x and one scale for each group."""
    rows, size = x.shape[:-1], x.shape[-1]
    q = x.new_empty((*rows, size // 2), dtype=torch.uint8)
    return q, x.new_empty((*rows, size // group), dtype=scale_dtype)


def alloc_unpacked(q: Tensor) -> Tensor:
    """fp32 for each code of q [T, K/2]."""
    return q.new_empty((*q.shape[:-1], 2 * q.shape[-1]), dtype=torch.float32)


# x [T, K] bf16 | f32 -> q [T, K/2] uint8, scale [T, K/32] uint8 (UE8M0)
quant_mxfp4 = define(
    "quant_mxfp4(Tensor x) -> (Tensor q, Tensor scale)",
    alloc=lambda x: alloc_fp4(x, MXFP4_GROUP, torch.uint8),
    reference=quant_mxfp4_reference,
    check=lambda x: expect_groups("quant_mxfp4", x, MXFP4_GROUP),
    inline=Inline.ALWAYS,
)

# q [T, K/2] uint8, scale [T, K/32] uint8 (UE8M0) -> x [T, K] f32
dequant_mxfp4 = define(
    "dequant_mxfp4(Tensor q, Tensor scale) -> (Tensor x)",
    alloc=lambda q, scale: alloc_unpacked(q),
    reference=dequant_mxfp4_reference,
    check=check_dequant_mxfp4,
    inline=Inline.ALWAYS,
)
