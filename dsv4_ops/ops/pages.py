"""Paged pools: where the bytes of an entry lie, and how references read and write them.

A pool is [pages, page_stride] and a sequence reaches its entries through a row of a block table [B, max_pages] int32:
entry i of sequence b lies in page `block_table[b, i // page_size]` at offset `i % page_size`. Three layouts, told apart
by what a pool holds and its dtype:

packed KV (uint8)      page_size x [nope E4M3 | rope BF16], then page_size x 8*ceil(nope/512) scale bytes, UE8M0 per 64
packed index (uint8)   FP8: page_size x [dim E4M3], then page_size x fp32 scale
                       FP4: page_size x [dim/2 E2M1 pairs], then page_size x [dim/32 UE8M0]
plain (float32)        page_size x [dim]: nothing is quantised (exact mode)

For head dimension 512 = 448 + 64 the packed KV page is the one of FlashMLA, vLLM and SGLang: 576 + 8 bytes an entry.
"""

import torch
from torch import Tensor

from dsv4_ops.ops.formats import (
    E4M3_MAX,
    FP8,
    FP8_AMAX_FLOOR,
    cast_e4m3,
    decode_finite_e4m3,
    decode_ue8m0,
    encode_e2m1,
    fp8_group_scale,
    look_up_e2m1_pairs,
    look_up_ue8m0,
    mxfp4_group_scale,
    pack_e2m1,
)

KV_GROUP = 64  # channels that share a scale in the packed KV page
INDEX_GROUP = 32  # channels that share a scale in the FP4 index page
PAGE_ALIGNMENT = 576  # TMA on Blackwell wants page strides that are multiples of this


def kv_entry_bytes(head_dim: int, rope_dim: int) -> tuple[int, int]:
    """Bytes of one packed KV entry: (data, scales)."""
    nope = head_dim - rope_dim
    return nope + 2 * rope_dim, 8 * -(-nope // (8 * KV_GROUP))


def kv_page_bytes(page_size: int, head_dim: int, rope_dim: int) -> int:
    """Bytes of one packed KV page, rounded up to the alignment of the data part."""
    size = page_size * sum(kv_entry_bytes(head_dim, rope_dim))
    return -(-size // PAGE_ALIGNMENT) * PAGE_ALIGNMENT


def gather_entries(
    pool: Tensor, block_table: Tensor, entries: Tensor, page_size: int, start: int, width: int
) -> Tensor:
    """Read `width` elements of each entry: entry e has them at `start + (e % page_size) * width` of its page.

    entries [B, ...] int (negative: entry 0, to be masked by the caller) -> [B, ..., width] in the pool's dtype.
    """
    entries = entries.clamp_min(0).long()
    page = block_table.gather(1, (entries // page_size).flatten(1)).view(entries.shape).long()
    parts = pool[:, start : start + page_size * width].unflatten(1, (page_size, width))
    return parts[page, entries % page_size]


def scatter_entries(
    pool: Tensor, block_table: Tensor, entries: Tensor, page_size: int, start: int, values: Tensor
) -> None:
    """Write `values` [B, N, width] to entries [B, N]; a negative entry is not written. Looks at the data: CPU only."""
    width = values.shape[-1]
    sequence, row = (entries >= 0).nonzero(as_tuple=True)
    entry = entries[sequence, row].long()
    page = block_table[sequence, entry // page_size].long()
    parts = pool[:, start : start + page_size * width].unflatten(1, (page_size, width))
    parts[page, entry % page_size] = values[sequence, row].to(pool.dtype)


def read_kv(pool: Tensor, block_table: Tensor, entries: Tensor, page_size: int, head_dim: int, rope_dim: int) -> Tensor:
    """Entries [B, ...] of a KV pool, dequantised: [B, ..., head_dim] fp32."""
    if pool.dtype == torch.float32:
        return gather_entries(pool, block_table, entries, page_size, 0, head_dim)
    nope = head_dim - rope_dim
    data_bytes, scale_bytes = kv_entry_bytes(head_dim, rope_dim)
    data = gather_entries(pool, block_table, entries, page_size, 0, data_bytes)
    scales = gather_entries(pool, block_table, entries, page_size, page_size * data_bytes, scale_bytes)
    groups = decode_finite_e4m3(data[..., :nope].contiguous().view(FP8)).unflatten(-1, (-1, KV_GROUP))
    groups = groups * decode_ue8m0(scales[..., : nope // KV_GROUP])[..., None]
    return torch.cat((groups.flatten(-2), data[..., nope:].contiguous().view(torch.bfloat16).float()), dim=-1)


def write_kv(pool: Tensor, block_table: Tensor, entries: Tensor, page_size: int, kv: Tensor, rope_dim: int) -> None:
    """Quantise kv [B, N, head_dim] (the first part to E4M3 in groups of 64, the rope part to BF16) and write it."""
    if pool.dtype == torch.float32:
        return scatter_entries(pool, block_table, entries, page_size, 0, kv.float())
    nope = kv.shape[-1] - rope_dim
    data_bytes, scale_bytes = kv_entry_bytes(kv.shape[-1], rope_dim)
    groups = kv[..., :nope].float().unflatten(-1, (-1, KV_GROUP))
    scale = fp8_group_scale(groups.abs().amax(-1))
    quantised = cast_e4m3(groups / decode_ue8m0(scale)[..., None]).flatten(-2).view(torch.uint8)
    rope = kv[..., nope:].to(torch.bfloat16).contiguous().view(torch.uint8)
    scale = torch.nn.functional.pad(scale, (0, scale_bytes - scale.shape[-1]))
    scatter_entries(pool, block_table, entries, page_size, 0, torch.cat((quantised, rope), dim=-1))
    scatter_entries(pool, block_table, entries, page_size, page_size * data_bytes, scale)


def index_page_bytes(page_size: int, dim: int, *, fp8: bool) -> int:
    """Bytes of one packed index page."""
    return page_size * (dim + 4 if fp8 else dim // 2 + dim // INDEX_GROUP)


def write_index_keys_fp8(pool: Tensor, block_table: Tensor, entries: Tensor, page_size: int, keys: Tensor) -> None:
    """Write keys [B, N, dim] as E4M3 with one fp32 scale max(amax, 1e-4) / 448 each."""
    scale = keys.float().abs().amax(-1, keepdim=True).clamp_min(FP8_AMAX_FLOOR) / E4M3_MAX
    data = cast_e4m3(keys.float() / scale).view(torch.uint8)
    scatter_entries(pool, block_table, entries, page_size, 0, data)
    scatter_entries(pool, block_table, entries, page_size, page_size * keys.shape[-1], scale.view(torch.uint8))


def read_index_keys_fp8(pool: Tensor, block_table: Tensor, entries: Tensor, page_size: int, dim: int) -> Tensor:
    """FP8 keys of entries [B, ...], dequantised: [B, ..., dim] fp32."""
    data = gather_entries(pool, block_table, entries, page_size, 0, dim)
    scale = gather_entries(pool, block_table, entries, page_size, page_size * dim, 4)
    return decode_finite_e4m3(data.view(FP8)) * scale.view(torch.float32)


def write_index_keys_fp4(pool: Tensor, block_table: Tensor, entries: Tensor, page_size: int, keys: Tensor) -> None:
    """Write keys [B, N, dim] as E2M1 with a UE8M0 scale for each group of 32."""
    groups = keys.float().unflatten(-1, (-1, INDEX_GROUP))
    scale = mxfp4_group_scale(groups.abs().amax(-1))
    data = pack_e2m1(encode_e2m1(groups / decode_ue8m0(scale)[..., None]).flatten(-2))
    scatter_entries(pool, block_table, entries, page_size, 0, data)
    scatter_entries(pool, block_table, entries, page_size, page_size * data.shape[-1], scale)


def read_index_keys_fp4(pool: Tensor, block_table: Tensor, entries: Tensor, page_size: int, dim: int) -> Tensor:
    """FP4 keys of entries [B, ...], dequantised: [B, ..., dim] fp32."""
    data = gather_entries(pool, block_table, entries, page_size, 0, dim // 2)
    scale = gather_entries(pool, block_table, entries, page_size, page_size * (dim // 2), dim // INDEX_GROUP)
    groups = look_up_e2m1_pairs(data).unflatten(-1, (-1, INDEX_GROUP))
    return (groups * look_up_ue8m0(scale)[..., None]).flatten(-2)
