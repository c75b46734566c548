"""Mixture of experts: the routed experts of a layer in four weight formats (the router: router.py).

Expert e computes w2_e (silu(min(w1_e x, limit)) * clamp(w3_e x, +-limit) * route weight). Rounding points of the
released code: the outputs of w1, w3 and w2 and the activation are rounded to the activation dtype (bf16; fp32 in exact
mode), the activation is quantised again before w2, and a row's experts are added in fp32 in the order of its k slots.
With `shared`, what the shared expert makes of the rows, their sum is added to it and rounded once to its dtype.
How the pairs of rows and slots meet their experts is in routed_experts.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dsv4_ops.ops.formats import FP8
from dsv4_ops.ops.gemm import (
    dequantise_blocks,
    dequantise_mxfp4,
    dequantise_nvfp4,
    expect_fp4,
    expect_fp8_blocks,
    expect_fp8_rows,
)
from dsv4_ops.ops.moe_workspace import alloc_workspace
from dsv4_ops.ops.norm import ACTIVATION_DTYPES
from dsv4_ops.ops.nvfp4 import NVFP4_GROUP, expect_global_scale, nvfp4_row_scale_reference, quant_nvfp4_reference
from dsv4_ops.ops.quant import MXFP4_GROUP, dequant_fp8_reference, quant_fp8_reference
from dsv4_ops.ops.routed_experts import Experts, Operand, routed_experts, take
from dsv4_ops.ops.router import expect_slots
from dsv4_ops.registry import Inline, define, describe, expect


def requantise_fp8(h: Tensor) -> Operand:
    """FP8 round trip of the activation in groups of 128 (of 64 or 32 where its width needs that)."""
    group = next(size for size in (128, 64, 32) if h.shape[-1] % size == 0)
    return dequant_fp8_reference(*quant_fp8_reference(h, group)), 1.0


def requantise_nvfp4(h: Tensor) -> Operand:
    """NVFP4 round trip of the activation with a global scale for each row, which stays a factor."""
    scale = nvfp4_row_scale_reference(h)
    return dequantise_nvfp4(*quant_nvfp4_reference(h, scale)), scale


def moe_dense_reference(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    limit: float,
    shared: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the routed experts of each row: bf16 or fp32 activations and weights."""

    def read(chosen: Tensor) -> tuple[Operand, ...]:
        return tuple((take(w, chosen).float(), 1.0) for w in (w1, w3, w2))

    experts = Experts(len(w1), read, lambda h: (h.float(), 1.0))
    return routed_experts(x.float(), None, ids, weights, experts, limit, x.dtype, shared)


def moe_fp8_input(dequantise: Callable[[Tensor, Tensor], Tensor]):
    def reference(
        x: Tensor,
        x_scale: Tensor,
        ids: Tensor,
        weights: Tensor,
        w1: Tensor,
        w1_scale: Tensor,
        w3: Tensor,
        w3_scale: Tensor,
        w2: Tensor,
        w2_scale: Tensor,
        limit: float,
        shared: Tensor | None = None,
    ) -> Tensor:
        """Weighted sum of the routed experts of each row: FP8 activations, weights FP8 in blocks or MXFP4."""

        def read(chosen: Tensor) -> tuple[Operand, ...]:
            scaled = ((w1, w1_scale), (w3, w3_scale), (w2, w2_scale))
            return tuple((dequantise(take(w, chosen), take(scale, chosen)), 1.0) for w, scale in scaled)

        x32, experts = dequant_fp8_reference(x, x_scale), Experts(len(w1), read, requantise_fp8)
        return routed_experts(x32, None, ids, weights, experts, limit, torch.bfloat16, shared)

    return reference


def moe_nvfp4_reference(
    x: Tensor,
    x_scale: Tensor,
    x_global: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    w1_global: Tensor,
    w3: Tensor,
    w3_scale: Tensor,
    w3_global: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    w2_global: Tensor,
    limit: float,
    shared: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the routed experts of each row: NVFP4 activations and weights."""

    def read(chosen: Tensor) -> tuple[Operand, ...]:
        triples = ((w1, w1_scale, w1_global), (w3, w3_scale, w3_global), (w2, w2_scale, w2_global))
        return tuple(
            (dequantise_nvfp4(take(w, chosen), take(scale, chosen)), take(factor, chosen)[:, None, None])
            for w, scale, factor in triples
        )

    x32, experts = dequantise_nvfp4(x, x_scale), Experts(len(w1), read, requantise_nvfp4)
    return routed_experts(x32, x_global, ids, weights, experts, limit, torch.bfloat16, shared)


def expect_experts(op: str, x: Tensor, ids: Tensor, weights: Tensor, columns: int, w1, w3, w2) -> None:
    """Raise unless w1, w3 [E, I, d] and w2 [E, d, I], `columns` values an element, fit x [T, d] and each other."""
    expect_slots(op, "ids", ids, torch.int32, x, ids.shape[-1])
    expect_slots(op, "weights", weights, torch.float32, x, ids.shape[-1])
    fits = x.dim() >= 2 and w1.dim() == 3 and w1.shape == w3.shape and w2.dim() == 3 and w2.shape[0] == w1.shape[0]
    fits = fits and w1.shape[2] == w2.shape[1] // columns and w2.shape[2] == w1.shape[1] // columns
    shapes = ", ".join(describe(w) for w in (w1, w3, w2))
    packed = "" if columns == 1 else f", the last dimension packed by {columns}"
    expect(fits, op, f"w1 and w3 must be [E, I, d] and w2 [E, d, I]{packed}, got {shapes}")


def expect_shared(op: str, shared: Tensor | None, x: Tensor, d: int, dtype: torch.dtype) -> None:
    """Raise unless `shared` is None or rows like those of x, of d elements in the activation dtype."""
    if shared is not None:
        fits = shared.dtype == dtype and shared.dim() == x.dim() and shared.shape[-1] == d
        wanted = f"[T, {d}] {str(dtype).removeprefix('torch.')} or None"
        expect(fits, op, f"shared must be {wanted}, got {describe(shared)}")


def check_moe_dense(x, ids, weights, w1, w3, w2, limit: float, shared=None) -> None:
    op = "moe_dense"
    fits = all(tensor.dtype in ACTIVATION_DTYPES for tensor in (x, w1, w3, w2)) and x.shape[-1] == w1.shape[-1]
    expect(fits, op, f"x and weights must be bfloat16 or float32 with one d, got {describe(x)} and {describe(w1)}")
    expect_experts(op, x, ids, weights, 1, w1, w3, w2)
    expect_shared(op, shared, x, x.shape[-1], x.dtype)


def check_moe_fp8(x, x_scale, ids, weights, w1, w1_scale, w3, w3_scale, w2, w2_scale, limit, shared=None) -> None:
    op = "moe_fp8"
    expect_fp8_rows(op, x, x_scale)
    for name, w, scale in (("w1", w1, w1_scale), ("w3", w3, w3_scale), ("w2", w2, w2_scale)):
        expect_fp8_blocks(op, name, w, scale)
    expect_experts(op, x, ids, weights, 1, w1, w3, w2)
    expect_width(op, x.shape[-1] == w1.shape[2] and w1.shape[1] % 32 == 0, x, w1)
    expect_shared(op, shared, x, x.shape[-1], torch.bfloat16)


def check_moe_mxfp4(x, x_scale, ids, weights, w1, w1_scale, w3, w3_scale, w2, w2_scale, limit, shared=None) -> None:
    op = "moe_mxfp4"
    expect_fp8_rows(op, x, x_scale)
    for name, w, scale in (("w1", w1, w1_scale), ("w3", w3, w3_scale), ("w2", w2, w2_scale)):
        expect_fp4(op, name, w, scale, MXFP4_GROUP, torch.uint8)
    expect_experts(op, x, ids, weights, 2, w1, w3, w2)
    expect_width(op, x.shape[-1] == 2 * w1.shape[2], x, w1)
    expect_shared(op, shared, x, x.shape[-1], torch.bfloat16)


def check_moe_nvfp4(
    x, x_scale, x_global, ids, weights, w1, w1_scale, w1_global, w3, w3_scale, w3_global, w2, w2_scale, w2_global,
    limit, shared=None,
) -> None:  # fmt: skip
    op = "moe_nvfp4"
    expect_fp4(op, "x", x, x_scale, NVFP4_GROUP, FP8)
    expect_global_scale(op, x, x_global)
    named = (("w1", w1, w1_scale, w1_global), ("w3", w3, w3_scale, w3_global), ("w2", w2, w2_scale, w2_global))
    for name, w, scale, factor in named:
        expect_fp4(op, name, w, scale, NVFP4_GROUP, FP8)
        fits = factor.dtype == torch.float32 and tuple(factor.shape) == tuple(w.shape[:1])
        expect(fits, op, f"{name}_global must be [{w.shape[0]}] float32, got {describe(factor)}")
    expect_experts(op, x, ids, weights, 2, w1, w3, w2)
    expect_width(op, x.shape[-1] == w1.shape[2], x, w1)
    expect_shared(op, shared, x, 2 * x.shape[-1], torch.bfloat16)


def expect_width(op: str, fits: bool, x: Tensor, w1: Tensor) -> None:
    expect(fits, op, f"x [T, d] and w1 [E, I, d] must have one d and I % 32 == 0, got {describe(x)} and {describe(w1)}")


def alloc_moe(x: Tensor, d: int, shared: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], d), dtype=torch.float32 if shared is None else shared.dtype)


def alloc_moe_fp8_input(
    x, x_scale, ids, weights, w1, w1_scale, w3, w3_scale, w2, w2_scale, limit, shared=None
) -> Tensor:
    return alloc_moe(x, x.shape[-1], shared)


def alloc_moe_nvfp4(
    x, x_scale, x_global, ids, weights, w1, w1_scale, w1_global, w3, w3_scale, w3_global, w2, w2_scale, w2_global,
    limit, shared=None,
) -> Tensor:  # fmt: skip
    return alloc_moe(x, 2 * x.shape[-1], shared)


# x [T, d] bf16 | f32, ids [T, k] int32 (outside 0 .. E-1: nothing is added), weights [T, k] f32,
# w1, w3 [E, I, d], w2 [E, d, I] bf16 | f32, shared [T, d] of the dtype of x -> y [T, d] f32, with shared its dtype
moe_dense = define(
    "moe_dense(Tensor x, Tensor ids, Tensor weights, Tensor w1, Tensor w3, Tensor w2, float limit, "
    "Tensor? shared=None) -> (Tensor y)",
    alloc=lambda x, ids, weights, w1, w3, w2, limit, shared=None: alloc_moe(x, x.shape[-1], shared),
    reference=moe_dense_reference,
    check=check_moe_dense,
    inline=Inline.STATIC_SHAPES,
    workspace=lambda x, ids, weights, w1, *others: alloc_workspace(x, x.shape[-1], ids, w1),
)

FP8_INPUT_ARGUMENTS = (
    "Tensor x, Tensor x_scale, Tensor ids, Tensor weights, Tensor w1, Tensor w1_scale, Tensor w3, Tensor w3_scale, "
    "Tensor w2, Tensor w2_scale, float limit, Tensor? shared=None"
)

# x [T, d] E4M3, x_scale [T, d/group] uint8, ids, weights as moe_dense, w1, w3 [E, I, d], w2 [E, d, I] E4M3, their
# scales [E, ceil(rows/128), ceil(columns/128)] uint8 | f32, shared [T, d] bf16 -> y [T, d] f32, with shared bf16
moe_fp8 = define(
    f"moe_fp8({FP8_INPUT_ARGUMENTS}) -> (Tensor y)",
    alloc=alloc_moe_fp8_input,
    reference=moe_fp8_input(dequantise_blocks),
    check=check_moe_fp8,
    workspace=lambda x, x_scale, ids, weights, w1, *others: alloc_workspace(x, x.shape[-1], ids, w1),
)

# x [T, d] E4M3, x_scale [T, d/group] uint8, ids, weights as moe_dense, w1, w3 [E, I, d/2], w2 [E, d, I/2] uint8, their
# scales [E, rows, columns/32] uint8, shared [T, d] bf16 -> y [T, d] f32, with shared bf16
moe_mxfp4 = define(
    f"moe_mxfp4({FP8_INPUT_ARGUMENTS}) -> (Tensor y)",
    alloc=alloc_moe_fp8_input,
    reference=moe_fp8_input(dequantise_mxfp4),
    check=check_moe_mxfp4,
    workspace=lambda x, x_scale, ids, weights, w1, *others: alloc_workspace(x, x.shape[-1], ids, w1),
)

# x [T, d/2] uint8, x_scale [T, d/16] E4M3, x_global [T, 1] | [1] f32, ids, weights as moe_dense, w1, w3 [E, I, d/2],
# w2 [E, d, I/2] uint8, their scales [E, rows, columns/16] E4M3 and globals [E] f32, shared [T, d] bf16
# -> y [T, d] f32, with shared bf16
moe_nvfp4 = define(
    "moe_nvfp4(Tensor x, Tensor x_scale, Tensor x_global, Tensor ids, Tensor weights, Tensor w1, Tensor w1_scale, "
    "Tensor w1_global, Tensor w3, Tensor w3_scale, Tensor w3_global, Tensor w2, Tensor w2_scale, Tensor w2_global, "
    "float limit, Tensor? shared=None) -> (Tensor y)",
    alloc=alloc_moe_nvfp4,
    reference=moe_nvfp4_reference,
    check=check_moe_nvfp4,
    workspace=lambda x, x_scale, x_global, ids, weights, w1, *others: alloc_workspace(x, 2 * x.shape[-1], ids, w1),
)
