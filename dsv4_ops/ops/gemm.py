"""Matrix products y = x @ weight^T, dense and quantised, plain and grouped. fp32 accumulation, one rounding at the end.

A quantised product is the product of the dequantised operands, which are exact in fp32: power-of-two and E4M3 scales
are applied to the operands, fp32 global scales to the product. `T` stands for any leading dimensions. Grouped products
keep the checkpoint's layout: x [T, G, K], weight [G*R, K], group g of x meets rows g*R .. (g+1)*R - 1.

On CUDA a row's bits do not depend on how many rows there are up to 64. Beyond, where libraries are faster, they compute
(csrc/gemm/large.h): FP8 with the accumulation of Hopper's tensor cores, which keeps 13 bits below the largest term.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from dsv4_ops.ops.formats import FP8, decode_finite_e4m3, look_up_e2m1_pairs, look_up_ue8m0
from dsv4_ops.ops.gemm_workspace import room_for_fp4, room_for_fp8, room_for_sums
from dsv4_ops.ops.nvfp4 import NVFP4_GROUP, expect_global_scale
from dsv4_ops.ops.quant import MXFP4_GROUP, dequant_fp8_reference
from dsv4_ops.registry import define, describe, expect

BLOCK = 128  # rows and columns of an FP8 weight that share a scale
VALUES_AT_ONCE = 1 << 17  # weights that a reference dequantises at a time: what fits into a CPU's cache


def scale_groups(values: Tensor, scale: Tensor) -> Tensor:
    """values [..., K] times the fp32 scale [..., K/group] of their group."""
    return (values.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


def dequantise_blocks(weight: Tensor, scale: Tensor) -> Tensor:
    """E4M3 [..., N, K] with a scale [..., ceil(N/128), ceil(K/128)] (UE8M0 or fp32) for each block -> fp32."""
    scale = look_up_ue8m0(scale) if scale.dtype == torch.uint8 else scale
    rows = scale.repeat_interleave(BLOCK, -2)[..., : weight.shape[-2], :]
    if weight.shape[-1] % BLOCK == 0:
        return scale_groups(decode_finite_e4m3(weight), rows)
    return decode_finite_e4m3(weight) * rows.repeat_interleave(BLOCK, -1)[..., : weight.shape[-1]]


def dequantise_mxfp4(weight: Tensor, scale: Tensor) -> Tensor:
    """Packed E2M1 [..., N, K/2] with UE8M0 scales [..., N, K/32] -> fp32 [..., N, K]."""
    return scale_groups(look_up_e2m1_pairs(weight), look_up_ue8m0(scale))


def dequantise_nvfp4(weight: Tensor, scale: Tensor) -> Tensor:
    """Packed E2M1 [..., N, K/2] with E4M3 scales [..., N, K/16] -> fp32 [..., N, K], without the global scale."""
    return scale_groups(look_up_e2m1_pairs(weight), scale.float())


def grouped(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, G, K] and weight [G*R, K] -> [T, G, R]."""
    groups = weight.unflatten(0, (x.shape[-2], -1))
    y = (x.flatten(0, -3).transpose(0, 1) @ groups.mT).transpose(0, 1)
    return y.reshape(*x.shape[:-1], groups.shape[1])


def linear_by_rows(x: Tensor, weight: Tensor, scale: Tensor, dequantise: Callable, rows_per_scale: int) -> Tensor:
    """fp32 x [T, K] @ dequantise(weight [N, K], scale)^T, some rows at a time."""
    rows = max(1, VALUES_AT_ONCE // (BLOCK * x.shape[-1])) * BLOCK
    starts = range(0, weight.shape[0], rows)
    scales = [scale[start // rows_per_scale : -(-(start + rows) // rows_per_scale)] for start in starts]
    return torch.cat(
        [linear(x, dequantise(weight[n : n + rows], part)) for n, part in zip(starts, scales, strict=True)], -1
    )


def linear_dense_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Product of bf16 or fp32 operands, rounded to the dtype of x."""
    if x.dtype == weight.dtype:
        return linear(x, weight)  # torch accumulates bf16 products in fp32
    return linear_fp32_reference(x, weight).to(x.dtype)


def linear_fp32_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Product of bf16 or fp32 operands, kept in fp32."""
    if weight.dtype == torch.float32:
        return linear(x.float(), weight)
    return linear_by_rows(x.float(), weight, weight, lambda rows, _: rows.float(), 1)


def linear_fp8_reference(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Product of FP8 activations and FP8 weights that have a scale for each 128x128 block."""
    x32 = dequant_fp8_reference(x, x_scale)
    return linear_by_rows(x32, weight, weight_scale, dequantise_blocks, BLOCK).to(torch.bfloat16)


def linear_mxfp4_reference(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Product of FP8 activations and MXFP4 weights."""
    x32 = dequant_fp8_reference(x, x_scale)
    return linear_by_rows(x32, weight, weight_scale, dequantise_mxfp4, 1).to(torch.bfloat16)


def linear_nvfp4_reference(
    x: Tensor, x_scale: Tensor, x_global: Tensor, weight: Tensor, weight_scale: Tensor, weight_global: Tensor
) -> Tensor:
    """Product of NVFP4 activations and NVFP4 weights; the global scales are applied to the fp32 sum."""
    y = linear_by_rows(dequantise_nvfp4(x, x_scale), weight, weight_scale, dequantise_nvfp4, 1)
    return (y * (x_global * weight_global)).to(torch.bfloat16)


def grouped_linear_dense_reference(x: Tensor, weight: Tensor) -> Tensor:
    """linear_dense with a block-diagonal weight: every group of x has rows of its own."""
    if x.dtype == weight.dtype:
        return grouped(x, weight).flatten(-2)
    return grouped(x.float(), weight.float()).flatten(-2).to(x.dtype)


def grouped_linear_fp8_reference(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """linear_fp8 with a block-diagonal weight."""
    y = grouped(dequant_fp8_reference(x, x_scale), dequantise_blocks(weight, weight_scale))
    return y.flatten(-2).to(torch.bfloat16)


def grouped_linear_mxfp4_reference(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """linear_mxfp4 with a block-diagonal weight."""
    y = grouped(dequant_fp8_reference(x, x_scale), dequantise_mxfp4(weight, weight_scale))
    return y.flatten(-2).to(torch.bfloat16)


def grouped_linear_nvfp4_reference(
    x: Tensor, x_scale: Tensor, x_global: Tensor, weight: Tensor, weight_scale: Tensor, weight_global: Tensor
) -> Tensor:
    """linear_nvfp4 with a block-diagonal weight."""
    y = grouped(dequantise_nvfp4(x, x_scale), dequantise_nvfp4(weight, weight_scale))
    return (y * (x_global * weight_global)).flatten(-2).to(torch.bfloat16)


def expect_product(op: str, x: Tensor, weight: Tensor, weight_columns: int) -> None:
    """Raise unless weight [N, columns] fits x [T, columns], or [T, G, columns] in a grouped product."""
    fits = weight.dim() == 2 and x.dim() >= 1 and weight.shape[1] == weight_columns
    expect(fits, op, f"weight must be [N, {weight_columns}] for x {describe(x)}, got {describe(weight)}")
    if op.startswith("grouped_"):
        wanted = "x must be [T, G, K] and weight [G*R, K]"
        fits = x.dim() >= 3 and weight.shape[0] % x.shape[-2] == 0
        expect(fits, op, f"{wanted}, got {describe(x)} and {describe(weight)}")


def expect_fp8_rows(op: str, x: Tensor, x_scale: Tensor) -> None:
    """Raise unless x [T, K] is E4M3 with a UE8M0 scale for each group of 32, 64 or 128."""
    group = x.shape[-1] // max(x_scale.shape[-1], 1)
    fits = x.dtype == FP8 and x_scale.dtype == torch.uint8 and x.dim() == x_scale.dim()
    fits = fits and group in (32, 64, 128) and group * x_scale.shape[-1] == x.shape[-1]
    wanted = "x must be [T, K] float8_e4m3fn and x_scale [T, K/group] uint8 with group 32, 64 or 128"
    expect(fits, op, f"{wanted}, got {describe(x)} and {describe(x_scale)}; see quant_fp8")


def expect_fp8_blocks(op: str, name: str, weight: Tensor, scale: Tensor) -> None:
    """Raise unless weight [..., N, K] is E4M3 with a UE8M0 or fp32 scale for each 128 x 128 block."""
    blocks = (*weight.shape[:-2], *(-(-size // BLOCK) for size in weight.shape[-2:]))
    fits = weight.dtype == FP8 and scale.dtype in (torch.uint8, torch.float32) and tuple(scale.shape) == blocks
    wanted = f"{name} must be [..., N, K] float8_e4m3fn with {name}_scale {list(blocks)} uint8 or float32"
    expect(fits, op, f"{wanted}, got {describe(weight)} and {describe(scale)}")


def expect_fp4(op: str, name: str, values: Tensor, scale: Tensor, group: int, scale_dtype: torch.dtype) -> None:
    """Raise unless values [..., K/2] are packed E2M1 with a scale for each group; rows of x are not looked at."""
    columns = 2 * values.shape[-1] // group
    fits = values.dtype == torch.uint8 and columns * group == 2 * values.shape[-1] and scale.dtype == scale_dtype
    fits = fits and scale.dim() == values.dim() and scale.shape[-1] == columns
    fits = fits and (name == "x" or scale.shape[:-1] == values.shape[:-1])
    wanted = f"[..., K/2] uint8 with {name}_scale [..., K/{group}] {str(scale_dtype).removeprefix('torch.')}"
    expect(fits, op, f"{name} must be {wanted}, got {describe(values)} and {describe(scale)}")


def check_dense(op: str):
    def check(x: Tensor, weight: Tensor) -> None:
        dtypes = (torch.bfloat16, torch.float32)
        fits = x.dtype in dtypes and weight.dtype in dtypes
        expect(fits, op, f"x and weight must be bfloat16 or float32, got {describe(x)} and {describe(weight)}")
        expect_product(op, x, weight, x.shape[-1])

    return check


def check_fp8_x(op: str, *, fp4_weight: bool):
    def check(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> None:
        expect_fp8_rows(op, x, x_scale)
        if fp4_weight:
            expect_fp4(op, "weight", weight, weight_scale, MXFP4_GROUP, torch.uint8)
        else:
            expect_fp8_blocks(op, "weight", weight, weight_scale)
        expect_product(op, x, weight, x.shape[-1] // (1 + fp4_weight))

    return check


def check_nvfp4(op: str):
    def check(x, x_scale, x_global, weight, weight_scale, weight_global) -> None:
        expect_fp4(op, "x", x, x_scale, NVFP4_GROUP, FP8)
        expect_fp4(op, "weight", weight, weight_scale, NVFP4_GROUP, FP8)
        expect_product(op, x, weight, x.shape[-1])
        expect_global_scale(op, x, x_global)
        fits = weight_global.dtype == torch.float32 and weight_global.shape in ((), (1,))
        expect(fits, op, f"weight_global must be [] or [1] float32, got {describe(weight_global)}")

    return check


def alloc_rows(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def alloc_groups(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-2], weight.shape[0]), dtype=dtype)


# x [T, K] bf16 | f32, weight [N, K] bf16 | f32 -> y [T, N] of x's dtype
linear_dense = define(
    "linear_dense(Tensor x, Tensor weight) -> (Tensor y)",
    alloc=lambda x, weight: alloc_rows(x, weight, x.dtype),
    reference=linear_dense_reference,
    check=check_dense("linear_dense"),
    workspace=lambda x, weight: room_for_sums(x, weight, 1),
)

# x [T, K] bf16 | f32, weight [N, K] bf16 | f32 -> y [T, N] f32
linear_fp32 = define(
    "linear_fp32(Tensor x, Tensor weight) -> (Tensor y)",
    alloc=lambda x, weight: alloc_rows(x, weight, torch.float32),
    reference=linear_fp32_reference,
    check=check_dense("linear_fp32"),
    workspace=lambda x, weight: room_for_sums(x, weight, 1),
)

# x [T, K] E4M3, x_scale [T, K/group] uint8, weight [N, K] E4M3, weight_scale [ceil(N/128), ceil(K/128)] uint8 | f32
# -> y [T, N] bf16
linear_fp8 = define(
    "linear_fp8(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale) -> (Tensor y)",
    alloc=lambda x, x_scale, weight, weight_scale: alloc_rows(x, weight, torch.bfloat16),
    reference=linear_fp8_reference,
    check=check_fp8_x("linear_fp8", fp4_weight=False),
    workspace=lambda x, x_scale, weight, *scale: room_for_fp8(x, weight, 1),
)

# x [T, K] E4M3, x_scale [T, K/group] uint8, weight [N, K/2] uint8, weight_scale [N, K/32] uint8 -> y [T, N] bf16
linear_mxfp4 = define(
    "linear_mxfp4(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale) -> (Tensor y)",
    alloc=lambda x, x_scale, weight, weight_scale: alloc_rows(x, weight, torch.bfloat16),
    reference=linear_mxfp4_reference,
    check=check_fp8_x("linear_mxfp4", fp4_weight=True),
    workspace=lambda x, x_scale, weight, *scale: room_for_fp4(x, weight),
)

# x [T, K/2] uint8, x_scale [T, K/16] E4M3, x_global [T, 1] | [1] f32,
# weight [N, K/2] uint8, weight_scale [N, K/16] E4M3, weight_global [] | [1] f32 -> y [T, N] bf16
linear_nvfp4 = define(
    "linear_nvfp4(Tensor x, Tensor x_scale, Tensor x_global, Tensor weight, Tensor weight_scale, "
    "Tensor weight_global) -> (Tensor y)",
    alloc=lambda x, x_scale, x_global, weight, weight_scale, weight_global: alloc_rows(x, weight, torch.bfloat16),
    reference=linear_nvfp4_reference,
    check=check_nvfp4("linear_nvfp4"),
    workspace=lambda x, x_scale, x_global, weight, *scales: room_for_fp4(x, weight),
)

# x [T, G, K] bf16 | f32, weight [G*R, K] bf16 | f32 -> y [T, G*R] of x's dtype
grouped_linear_dense = define(
    "grouped_linear_dense(Tensor x, Tensor weight) -> (Tensor y)",
    alloc=lambda x, weight: alloc_groups(x, weight, x.dtype),
    reference=grouped_linear_dense_reference,
    check=check_dense("grouped_linear_dense"),
    workspace=lambda x, weight: room_for_sums(x, weight, 2),
)

# x [T, G, K], x_scale [T, G, K/group], weight [G*R, K], weight_scale [ceil(G*R/128), ceil(K/128)] as linear_fp8
# -> y [T, G*R] bf16
grouped_linear_fp8 = define(
    "grouped_linear_fp8(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale) -> (Tensor y)",
    alloc=lambda x, x_scale, weight, weight_scale: alloc_groups(x, weight, torch.bfloat16),
    reference=grouped_linear_fp8_reference,
    check=check_fp8_x("grouped_linear_fp8", fp4_weight=False),
    workspace=lambda x, x_scale, weight, *scale: room_for_fp8(x, weight, 2),
)

# x [T, G, K], x_scale [T, G, K/group], weight [G*R, K/2], weight_scale [G*R, K/32] as linear_mxfp4 -> y [T, G*R] bf16
grouped_linear_mxfp4 = define(
    "grouped_linear_mxfp4(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale) -> (Tensor y)",
    alloc=lambda x, x_scale, weight, weight_scale: alloc_groups(x, weight, torch.bfloat16),
    reference=grouped_linear_mxfp4_reference,
    check=check_fp8_x("grouped_linear_mxfp4", fp4_weight=True),
    workspace=lambda x, x_scale, weight, *scale: room_for_sums(x, weight, 2),
)

# x [T, G, K/2], x_scale [T, G, K/16], x_global [T, G, 1] | [1], weight [G*R, K/2], weight_scale [G*R, K/16],
# weight_global [] | [1] as linear_nvfp4 -> y [T, G*R] bf16
grouped_linear_nvfp4 = define(
    "grouped_linear_nvfp4(Tensor x, Tensor x_scale, Tensor x_global, Tensor weight, Tensor weight_scale, "
    "Tensor weight_global) -> (Tensor y)",
    alloc=lambda x, x_scale, x_global, weight, weight_scale, weight_global: alloc_groups(x, weight, torch.bfloat16),
    reference=grouped_linear_nvfp4_reference,
    check=check_nvfp4("grouped_linear_nvfp4"),
    workspace=lambda x, x_scale, x_global, weight, *scales: room_for_sums(x, weight, 2),
)
