"""Products of bf16 activations and FP8 weights, which are multiplied as bf16 numbers: W8A16, or weight-only FP8.

Scales are powers of two, so that E4M3 times its scale is exact in bf16, and the product is that of the converted weight
to the bit while half of the bytes are read. The few scales with which it is not, because products leave the range of
bf16, round as the conversion does. Shapes and grouped products as in gemm.py.

On CUDA the bits are those of linear_dense with the converted weight wherever both are cut alike: K a multiple of 1024.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from dsv4_ops.ops.gemm import alloc_groups, alloc_rows, dequantise_blocks, expect_fp8_blocks, expect_product, grouped
from dsv4_ops.ops.gemm_workspace import room_for_w8a16
from dsv4_ops.registry import define, describe, expect


def linear_w8a16_reference(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """linear_dense with an FP8 weight that is converted to bf16; its scales are powers of two."""
    return linear(x, dequantise_blocks(weight, weight_scale).to(torch.bfloat16))


def grouped_linear_w8a16_reference(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """linear_w8a16 with a block-diagonal weight."""
    return grouped(x, dequantise_blocks(weight, weight_scale).to(torch.bfloat16)).flatten(-2)


def check_w8a16(op: str):
    def check(x: Tensor, weight: Tensor, weight_scale: Tensor) -> None:
        expect(x.dtype == torch.bfloat16, op, f"x must be bfloat16, got {describe(x)}")
        powers = weight_scale.dtype == torch.uint8
        expect(powers, op, f"weight_scale must be uint8, powers of two, got {describe(weight_scale)}")
        expect_fp8_blocks(op, "weight", weight, weight_scale)
        expect_product(op, x, weight, x.shape[-1])

    return check


# x [T, K] bf16, weight [N, K] E4M3, weight_scale [ceil(N/128), ceil(K/128)] uint8 -> y [T, N] bf16
linear_w8a16 = define(
    "linear_w8a16(Tensor x, Tensor weight, Tensor weight_scale) -> (Tensor y)",
    alloc=lambda x, weight, weight_scale: alloc_rows(x, weight, torch.bfloat16),
    reference=linear_w8a16_reference,
    check=check_w8a16("linear_w8a16"),
    workspace=lambda x, weight, weight_scale: room_for_w8a16(x, weight, 1),
)

# x [T, G, K] bf16, weight [G*R, K] E4M3, weight_scale [ceil(G*R/128), ceil(K/128)] uint8 -> y [T, G*R] bf16
grouped_linear_w8a16 = define(
    "grouped_linear_w8a16(Tensor x, Tensor weight, Tensor weight_scale) -> (Tensor y)",
    alloc=lambda x, weight, weight_scale: alloc_groups(x, weight, torch.bfloat16),
    reference=grouped_linear_w8a16_reference,
    check=check_w8a16("grouped_linear_w8a16"),
    workspace=lambda x, weight, weight_scale: room_for_w8a16(x, weight, 2),
)
