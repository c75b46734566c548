"""Arguments of sparse_attention_mixed, from those of sparse_attention_selected."""

import torch

from dsv4_ops.ops.attention_mixed import split_queries
from graph_tests.ops.attention_cases import make

# Orders in which the dimensions of queries [B, S, H] may lie in memory: rows outside, heads outside, tokens outside.
LAYOUTS = ((0, 1, 2), (2, 0, 1), (1, 2, 0))
SEQUENCE_ARGUMENTS = (0, 1, 2, 7, 8, 9, 10)  # places of the arguments with a row for each sequence


def laid_out(part: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The same [B, S, H, ...], its first three dimensions in another order in memory, outermost first."""
    rest = tuple(range(3, part.dim()))
    back = [order.index(dim) for dim in range(3)]
    return part.permute(*order, *rest).contiguous().permute(*back, *rest)


def make_mixed(positions: list[list[int]], layouts: tuple = (LAYOUTS[0],) * 3, **options) -> tuple[tuple, tuple]:
    """Arguments of the op, and those of sparse_attention_selected with the queries that they came from."""
    (q, *others), _ = make("selected", positions, dtype=torch.bfloat16, **options)
    parts = split_queries(q, others[3].shape[1])
    parts = (laid_out(part, order) for part, order in zip(parts, layouts, strict=True))
    return (*parts, *others), (q, *others)
