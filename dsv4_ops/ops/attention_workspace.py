"""What the kernels of sparse attention hand from one launch to the next: room for it, by the shapes of a call.

Few rows are shared out among two kernels, all others need no room.
"""

import torch
from torch import Tensor

UNIT = 64  # keys that csrc/attention adds to a row's result in one step
# Two kernels share out the units and dimensions of a row for at most so many rows x tiles of 64 heads, so many bytes.
# H100, 2026-11-25, us of two kernels and of one: 64 heads, 640 keys, 16 rows 14.5 and 19.7. H200, before codes went
# through L1: 32 rows 30.5 and 23.7; 128 heads, 1152 keys, 8 rows 21.8 and 34.7, 16 rows 46.8 and 36.9; 16 heads, 640
# keys, 16 rows 12.5 and 22.8, 32 rows 26.7 and 24.8.
# In between both leave something: 16 rows of 128 heads are more CTAs of two kernels than an SM has room for, but as one
# kernel 64 CTAs for 132 SMs, each of which adds 18 units one after the other, 34 us in all.
SPLIT_TILES = 16
# With few keys the second launch is worth less. 64 heads, 128 keys, 1 row 5.6 and 6.8, 8 rows 7.3 and 7.0.
FEW_KEYS = 128
SPLIT_TILES_FEW_KEYS = 4
SPLIT_BYTES = 2**27


def partials(q: Tensor, keys: int) -> Tensor:
    """Room for the weights of all `keys` of few rows, handed from CTAs that have some keys to CTAs that have some dims.

    Otherwise nothing, and a CTA does all of a row and tile of heads. The result has the same bits.
    """
    rows, heads = q.shape[0] * q.shape[1], q.shape[2]
    padded = next((tile for tile in (8, 16, 32) if heads <= tile), -(-heads // 64) * 64)
    size = rows * padded * -(-keys // UNIT) * (UNIT * 2 + 8)  # bf16 weights, the largest score and the sum in fp32
    tiles = SPLIT_TILES if keys > FEW_KEYS else SPLIT_TILES_FEW_KEYS
    few = rows * -(-heads // 64) <= tiles and size <= SPLIT_BYTES
    return q.new_empty(size // 4 if few and q.dtype == torch.bfloat16 else 0, dtype=torch.float32)


def workspace_window(q: Tensor, *others) -> Tensor:
    window = others[-2]
    return partials(q, window)


def workspace_selected(q: Tensor, *others) -> Tensor:
    indices, window = others[6], others[-3]
    return partials(q, window + indices.shape[2])


def workspace_compressed(q: Tensor, *others) -> Tensor:
    table, window, page_size = others[5], others[-4], others[-1]
    return partials(q, window + table.shape[1] * page_size)
