"""What the kernels of sparse attention hand from one launch to the next: room for it, by the shapes of a call.

Few rows are shared out among two kernels, many rows of a sequence read keys that are unpacked once, and all others need
no room.
"""

import torch
from torch import Tensor

UNIT = 64  # keys that csrc/attention adds to a row's result in one step
# Two kernels share out the units and dimensions of a row for at most so many rows x tiles of 64 heads, so many bytes.
# H200, 2026-11-25, us of two kernels and of one: 64 heads, 640 keys, 16 rows 16.2 and 22.2, 32 rows 30.5 and 23.7; 128
# heads, 1152 keys, 8 rows 21.8 and 34.7, 16 rows 46.8 and 36.9; 16 heads, 640 keys, 16 rows 12.5 and 22.8, 32 rows 26.7
# and 24.8.
SPLIT_TILES = 16
# With few keys the second launch is worth less. 64 heads, 128 keys, 1 row 5.6 and 6.8, 8 rows 7.3 and 7.0.
FEW_KEYS = 128
SPLIT_TILES_FEW_KEYS = 4
SPLIT_BYTES = 2**27
# The rows of a chunk, at least so many of a sequence, read keys that are unpacked once, if they read so many, and so
# many more for each entry there is, and the unpacked entries take at most so many bytes: a launch and an entry cost
# about what so many reads save. H200, 2026-11-25, 64 heads, rows x keys, us of keys unpacked once and by each row: 512
# x 640 after 32K tokens 116 and 122, 1024 x 640 after 128K 241 and 263, 4096 x 640 after 32K 844 and 966; but 256 x 640
# after 32K 62 and 58, 512 x 640 after 128K 134 and 133, 512 x 128 of the window 46 and 41.
UNPACK_ROWS = 128
UNPACK_READS = 2**18
UNPACK_READS_OF_ENTRY = 12
UNPACK_BYTES = 2**29


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


def unpacked(q: Tensor, keys: int, entries: int, dim: int) -> Tensor:
    """Room for all `entries` of each sequence's block tables in BF16, and one of zeros, for rows of `keys` keys.

    Of q the shape [B, S, H, ...] counts. Otherwise nothing, and every row unpacks the keys that it reads.
    """
    size = (1 + q.shape[0] * entries) * dim * 2
    enough = q.shape[1] * keys >= UNPACK_READS + UNPACK_READS_OF_ENTRY * entries
    pays = q.shape[2] > 32 and enough and size <= UNPACK_BYTES
    return q.new_empty(size // 4 if pays and q.dtype == torch.bfloat16 else 0, dtype=torch.float32)


def workspace_window(q: Tensor, *others) -> Tensor:
    window, page_size = others[-2:]
    if q.shape[1] >= UNPACK_ROWS:
        return unpacked(q, window, others[3].shape[1] * page_size, q.shape[3])
    return partials(q, window)


def workspace_selected(q: Tensor, *others) -> Tensor:
    window, page_size, far_page_size = others[-3:]
    keys = window + others[6].shape[2]
    if q.shape[1] >= UNPACK_ROWS:
        return unpacked(q, keys, others[4].shape[1] * page_size + others[5].shape[1] * far_page_size, q.shape[3])
    return partials(q, keys)


def workspace_compressed(q: Tensor, *others) -> Tensor:
    window, _, page_size, far_page_size = others[-4:]
    entries = others[5].shape[1] * far_page_size
    if q.shape[1] >= UNPACK_ROWS:
        return unpacked(q, window + entries, others[4].shape[1] * page_size + entries, q.shape[3])
    return partials(q, window + entries)


def workspace_mixed(q_nope: Tensor, q_scale: Tensor, q_rope: Tensor, *others) -> Tensor:
    window, page_size, far_page_size = others[-3:]
    entries = others[4].shape[1] * page_size + others[5].shape[1] * far_page_size
    reads = window + others[6].shape[2] if q_nope.shape[1] >= UNPACK_ROWS else 0
    return unpacked(q_rope, reads, entries, q_nope.shape[3] + q_rope.shape[3])
