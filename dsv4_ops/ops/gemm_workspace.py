"""What the kernels of matrix products hand from one launch to the next: room for it, decided by shapes alone."""

from math import prod

import torch
from torch import Tensor

MOST_RANGES, WIDE_ROWS = 8, 25600  # kMostRanges and kWideRows of csrc/gemm/plan.h
FEW_ROWS = 8  # kFewTokens of csrc/gemm/gemm.h: no second launch up to there
MOST_STREAM_ROWS = 64  # kTokensAtOnce of csrc/gemm/gemm.h
LEAST_CONVERTED_ROWS = 193  # kLeastW8a16 of csrc/gemm/large.cpp
FP8_BLOCK = 128


def room_for_sums(x: Tensor, weight: Tensor, inner: int, large: int = 0) -> Tensor:
    """The sums of ranges of K that a second launch adds (csrc/gemm/plan.h): of more than 8 rows of x, 64 at a time,
    where the weight is too narrow to occupy a GPU by its rows alone. Or `large` numbers, if those are more.

    x [T, K] (inner 1) or [T, G, K] (inner 2).
    """
    tokens, rows = prod(x.shape[:-inner]), weight.shape[0]
    sums = MOST_RANGES * min(tokens, MOST_STREAM_ROWS) * rows if tokens > FEW_ROWS and rows < WIDE_ROWS else 0
    return x.new_empty((max(sums, large),), dtype=torch.float32)


def room_for_fp8(x: Tensor, weight: Tensor, inner: int) -> Tensor:
    """`room_for_sums`, or the fp32 scales of a product of more than 64 rows of x (csrc/gemm/large.h)."""
    tokens, columns = prod(x.shape[:-inner]), -(-x.shape[-1] // FP8_BLOCK)
    rows = prod(x.shape[:-1]) + -(-weight.shape[0] // FP8_BLOCK)
    return room_for_sums(x, weight, inner, rows * columns if tokens > MOST_STREAM_ROWS else 0)


def room_for_w8a16(x: Tensor, weight: Tensor, inner: int) -> Tensor:
    """`room_for_sums`, or, of so many rows of x that converting it pays, the weight in bf16 (csrc/gemm/large.h)."""
    many = prod(x.shape[:-inner]) >= LEAST_CONVERTED_ROWS
    return room_for_sums(x, weight, inner, -(-weight.numel() // 2) if many else 0)


def room_for_fp4(x: Tensor, weight: Tensor) -> Tensor:
    """`room_for_sums`, or more than 64 rows of x in bf16, a multiple of 16 of them (csrc/moe/prefill.h)."""
    tokens, columns = prod(x.shape[:-1]), 2 * weight.shape[1]
    return room_for_sums(x, weight, 1, -(-tokens // 16) * 8 * columns if tokens > MOST_STREAM_ROWS else 0)
