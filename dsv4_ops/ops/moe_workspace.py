"""How much the kernels of the routed experts hand from one launch to the next: the numbers of csrc/moe."""

import torch
from torch import Tensor

DECODE_ROWS = 64  # beyond so many rows a GPU may compute whole matrices of every expert: csrc/moe/prefill.h


def alloc_workspace(x: Tensor, d: int, ids: Tensor, w1: Tensor) -> Tensor:
    """h and the result of every pair, and a global scale for each: workspace_of in csrc/moe/moe.h."""
    pairs, size = ids.numel(), 4 if x.dtype == torch.float32 else 2
    parts = (pairs * w1.shape[1] * size, pairs * d * size, pairs * 4)
    needed = sum((part + 15) // 16 * 16 for part in parts)
    if pairs > DECODE_ROWS * ids.shape[-1] and size == 2:
        needed = max(needed, prefill_bytes(pairs, w1.shape[0], d, w1.shape[1]))
    return x.new_empty((needed,), dtype=torch.uint8)


def prefill_bytes(pairs: int, experts: int, d: int, inner: int) -> int:
    """The workspace of a prefill, whose rows are those of every expert in multiples of 16: csrc/moe/prefill.h."""
    used = min(pairs, experts)
    rows, blocks = (pairs + 15 * used) // 16 * 16, (pairs + 127 * used) // 128
    parts = (rows * inner * 2, rows * d * 2, pairs * 4, *[rows * 4] * 4, blocks * 16, 8)
    return sum((part + 255) // 256 * 256 for part in parts)
