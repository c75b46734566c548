"""The experts of a layer added up, in whatever format their weights are: the part that the references of moe.py share.

The pairs (row, slot) are sorted by expert and cut into blocks of one expert, whose weights are gathered and
dequantised once a block. All sizes follow from shapes: nothing depends on where the router sends a row. With few rows
a block is one pair, so that a decode step reads the chosen experts only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_ops.ops.norm import swiglu_reference

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
