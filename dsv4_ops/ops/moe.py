"""Mixture of experts: the routed experts of a layer in four weight formats (the router: gate.py).

Expert e computes w2_e (silu(min(w1_e x, limit)) * clamp(w3_e x, +-limit) * route weight). Rounding points of the
released code: the outputs of w1, w3 and w2 and the activation are rounded to the activation dtype (bf16; fp32 in exact
mode), the activation is quantised again before w2, and a row's experts are added in fp32 in the order of its k slots.
With `shared`, what the shared expert makes of the rows, their sum is added to it and rounded once to its dtype.

The pairs (row, slot) are sorted by expert and cut into blocks of one expert, whose weights are gathered and
dequantised once a block. All sizes follow from shapes: nothing depends on where the router sends a row. With few rows
a block is one pair, so that a decode step reads the chosen experts only.
"""

from collections.abc import Callable
from dataclasses import dataclass

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
from dsv4_ops.ops.norm import ACTIVATION_DTYPES, swiglu_reference
from dsv4_ops.ops.nvfp4 import NVFP4_GROUP, expect_global_scale, nvfp4_row_scale_reference, quant_nvfp4_reference
from dsv4_ops.ops.quant import MXFP4_GROUP, dequant_fp8_reference, quant_fp8_reference
from dsv4_ops.ops.router import expect_slots
from dsv4_ops.registry import Inline, define, describe, expect

BLOCK_PAIRS = 16  # pairs in a block of one expert when there are more pairs than experts
BLOCKS_AT_ONCE = 8  # experts that lie dequantised in memory at the same time

Operand = tuple[Tensor, Tensor | float]  # fp32 values [b, N, K] and a factor of every product with them (global scale)


@dataclass(frozen=True)
class Experts:
    """What differs between the formats: how weights are read, and how the activation is quantised before w2."""

    count: int
    read: Callable[[Tensor], tuple[Operand, ...]]  # experts [b] -> their w1, w3, w2
    requantise: Callable[[Tensor], Operand]


@dataclass(frozen=True)
class Blocks:
    """Where the P = T*k pairs (row, slot) go: blocks of places, each block served by one expert."""

    expert: Tensor  # [blocks] expert of each block
    pair: Tensor  # [blocks, size] pair at each place; an empty place repeats pair 0 and is not read back
    place: Tensor  # [P] place of each pair
    valid: Tensor  # [P] whether there is such an expert


def single_pairs(ids: Tensor, experts: int) -> Blocks:
    """Blocks of one pair, in the order of ids [P]."""
    place = torch.arange(len(ids), device=ids.device)
    return Blocks(ids.clamp(0, experts - 1), place[:, None], place, (ids >= 0) & (ids < experts))


def sorted_pairs(ids: Tensor, experts: int, size: int) -> Blocks:
    """Pairs of ids [P] sorted by expert; every expert fills whole blocks, as many in all as the worst case needs."""
    chosen = ids[:, None] == torch.arange(experts, device=ids.device)
    valid = chosen.any(1)
    count = (len(ids) + min(experts, len(ids)) * (size - 1)) // size
    blocks_of = (chosen.sum(0) + size - 1) // size
    end = blocks_of.cumsum(0)
    rank = (chosen.cumsum(0) * chosen).sum(1) - 1  # among the pairs of the same expert
    place = ((end - blocks_of) * size * chosen).sum(1) + rank
    pair = torch.zeros(count * size + 1, dtype=torch.long, device=ids.device)
    pair = pair.scatter(0, torch.where(valid, place, count * size), torch.arange(len(ids), device=ids.device))
    expert = (torch.arange(count, device=ids.device)[:, None] >= end).sum(1).clamp_max(experts - 1)
    return Blocks(expert, pair[:-1].view(count, size), place.clamp_min(0), valid)


def product(x: Operand, weight: Operand) -> Tensor:
    """x [b, M, K] times weight [b, N, K] transposed, fp32."""
    return (x[0] @ weight[0].mT) * (x[1] * weight[1])


def routed_experts(
    x: Tensor,
    factor: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    experts: Experts,
    limit: float,
    dtype: torch.dtype,
    shared: Tensor | None,
) -> Tensor:
    """Sum over the slots of every row: x [T, d] f32 times factor [T, 1] | [1], ids and weights [T, k] -> [T, d] f32,
    or shared [T, d] and this sum."""
    k, pairs, count = ids.shape[-1], ids.flatten().long(), experts.count
    blocks = single_pairs(pairs, count) if len(pairs) <= count else sorted_pairs(pairs, count, BLOCK_PAIRS)
    factor = (x.new_ones(1) if factor is None else factor).expand(*x.shape[:-1], 1)
    outputs = []
    for first in range(0, max(len(blocks.expert), 1), BLOCKS_AT_ONCE):
        pair = blocks.pair[first : first + BLOCKS_AT_ONCE]
        w1, w3, w2 = experts.read(blocks.expert[first : first + BLOCKS_AT_ONCE])
        rows = take(x.flatten(0, -2), pair // k), take(factor.flatten(0, -2), pair // k)
        gate_up = torch.cat((product(rows, w1), product(rows, w3)), dim=-1).to(dtype)
        h = swiglu_reference(gate_up, take(weights.flatten(), pair), limit)
        outputs.append(product(experts.requantise(h), w2).to(dtype).float().flatten(0, 1))
    slots = torch.where(blocks.valid[:, None], take(torch.cat(outputs), blocks.place), 0.0).unflatten(0, ids.shape)
    routed = sum((slots[..., slot, :] for slot in range(k)), torch.zeros_like(x))
    return routed if shared is None else (shared.float() + routed).to(shared.dtype)


def take(table: Tensor, index: Tensor) -> Tensor:
    """table[index] along the first dimension (index_select: an order of magnitude faster than indexing on a CPU)."""
    return table.index_select(0, index.flatten()).unflatten(0, index.shape)


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
