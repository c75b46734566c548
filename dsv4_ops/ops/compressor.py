"""Compressors: the tokens of a group become one entry of the compressed cache, by a softmax per channel over the group.

Every token projects to kv and score (fp32); score gets a bias `ape` by the token's place in its group. Group w holds
the positions w * ratio ... (w + 1) * ratio - 1, and its entry is written when the last of them arrives:

    HCA  entry w = sum over the tokens j of group w of softmax_j(score) * kv
    CSA  channels [0:D] of a token are for the group after its own, [D:2D] for its own: entry w pools the first half of
         group w - 1 and the second half of group w in one softmax over 2 * ratio rows. Group 0 has no predecessor:
         those rows weigh nothing.

then RMSNorm, RoPE at position w * ratio, quantise, insert. In front of the norm, of the RoPE and of the quantiser the
entry is rounded to bf16, unless the pool is float32. Packed index keys go through a Hadamard transform after the RoPE
(fp32 inside, rounded to bf16).

`state` [B, slots, 2, width] keeps [kv | score + ape] of the latest tokens: position p in slot p % slots. It must hold
the open group (CSA: and the one before), so slots is ratio (HCA) or 2 * ratio (CSA). Which slots are read follows
from the positions alone: what an earlier sequence left there is never used.

Shapes, the same for all ops (width = D for HCA, 2D for CSA and index keys):
  state f32 [B, slots, 2, width]              pool [pages, page_stride] uint8 (packed) | f32 (plain); both are updated
  kv, score f32 [B, S, width] projections     ape f32 [ratio, width]      norm_weight [D] bf16|f32
  rope_table f32 [max_pos, R]                 block_table int32 [B, max_pages]
  positions int32 [B, S]: start, start + 1, ..., then -1 for rows that hold no token
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dsv4_ops.ops import pages
from dsv4_ops.ops.formats import hadamard
from dsv4_ops.ops.norm import expect_rope, rms_norm_reference
from dsv4_ops.ops.rope import apply_rope
from dsv4_ops.registry import define_mutating, describe, expect

ARGUMENTS = (
    "Tensor(a!) state, Tensor(b!) pool, Tensor kv, Tensor score, Tensor ape, Tensor norm_weight, Tensor rope_table,"
    " Tensor block_table, Tensor positions, float eps, int ratio, int page_size"
)


def _chunk_span(positions: Tensor) -> tuple[Tensor, Tensor]:
    """First position [B, 1] of each sequence's chunk and the one after its last; (0, 0) if it has no row."""
    start = positions[:, :1].clamp_min(0)
    return start, start + (positions >= 0).sum(1, keepdim=True)


def _completed_groups(positions: Tensor, ratio: int) -> Tensor:
    """Groups that end in the chunk [B, ceil(S / ratio)], -1 where the chunk ends fewer."""
    start, end = _chunk_span(positions)
    groups = start // ratio + torch.arange(-(-positions.shape[1] // ratio), device=positions.device)
    return torch.where((groups + 1) * ratio <= end, groups, -1)


def _token_rows(state: Tensor, rows: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
    """Rows of the tokens at positions `wanted` [B, N]: from the chunk, or from the state if they came before it.

    rows [B, S, 2, width] -> [B, N, 2, width]. What stands at a position that is in neither is arbitrary.
    """
    start, _ = _chunk_span(positions)
    sequence = torch.arange(rows.shape[0], device=rows.device)[:, None]
    in_chunk = rows[sequence, (wanted - start).clamp(0, rows.shape[1] - 1)]
    return torch.where((wanted >= start)[..., None, None], in_chunk, state[sequence, wanted % state.shape[1]])


def _pool_groups(state: Tensor, rows: Tensor, positions: Tensor, groups: Tensor, ratio: int) -> Tensor:
    """Entries [B, G, D] fp32 of `groups` [B, G]. Of two halves of a row, the first is for the group after its own."""
    halves = state.shape[1] // ratio  # 1 (HCA) or 2 (CSA)
    tokens, exists = [], []
    for lag, kept, new in zip(reversed(range(halves)), state.chunk(halves, -1), rows.chunk(halves, -1), strict=True):
        wanted = (groups - lag)[..., None] * ratio + torch.arange(ratio, device=groups.device)
        tokens.append(_token_rows(kept, new, positions, wanted.flatten(1)).unflatten(1, wanted.shape[1:]))
        exists.append(wanted >= 0)
    kv, score = torch.cat(tokens, dim=2).unbind(3)
    exists = torch.cat(exists, dim=2)[..., None]
    weight = torch.where(exists, score, -torch.inf).softmax(2)
    return (torch.where(exists, kv, 0.0) * weight).sum(2)


def _store_rows(state: Tensor, rows: Tensor, positions: Tensor) -> None:
    """Write the chunk's last `slots` rows that hold a token into their slots. Looks at the data: CPU only."""
    _, end = _chunk_span(positions)
    sequence, row = ((positions >= 0) & (positions >= end - state.shape[1])).nonzero(as_tuple=True)
    state[sequence, positions[sequence, row].long() % state.shape[1]] = rows[sequence, row]


def _norm_rope(pooled: Tensor, norm_weight: Tensor, rope_table: Tensor, first: Tensor, eps: float) -> Tensor:
    normed = rms_norm_reference(pooled, norm_weight, eps)
    return apply_rope(normed.float(), rope_table, first).to(pooled.dtype)


def _compress_append(
    insert: Callable,
    state,
    pool,
    kv,
    score,
    ape,
    norm_weight,
    rope_table,
    block_table,
    positions,
    eps,
    ratio,
    page_size,
) -> None:
    """The whole op; `insert(pool, block_table, groups, page_size, entries, rope_dim)` quantises and writes."""
    if positions.numel() == 0:
        return
    positions = positions.long()
    rows = torch.stack((kv, score + ape[positions.clamp_min(0) % ratio]), dim=2)
    groups = _completed_groups(positions, ratio)
    if not (groups >= 0).any():  # most decode steps
        _store_rows(state, rows, positions)
        return
    pooled = _pool_groups(state, rows, positions, groups, ratio)
    _store_rows(state, rows, positions)
    pooled = pooled if pool.dtype == torch.float32 else pooled.to(torch.bfloat16)
    entries = _norm_rope(pooled, norm_weight, rope_table, groups * ratio, eps)
    insert(pool, block_table, groups, page_size, entries, rope_table.shape[1])


def _insert_key_plain(pool, block_table, groups, page_size, keys, rope_dim) -> None:
    pages.scatter_entries(pool, block_table, groups, page_size, 0, keys)


def _insert_key_fp8(pool, block_table, groups, page_size, keys, rope_dim) -> None:
    pages.write_index_keys_fp8(pool, block_table, groups, page_size, hadamard(keys.float()).to(torch.bfloat16))


def _insert_key_fp4(pool, block_table, groups, page_size, keys, rope_dim) -> None:
    pages.write_index_keys_fp4(pool, block_table, groups, page_size, hadamard(keys.float()).to(torch.bfloat16))


def _check_rows(op: str, halves: int, state, kv, score, ape, norm_weight, ratio: int) -> None:
    dim = norm_weight.shape[-1]
    width = halves * dim
    fits = norm_weight.dim() == 1 and norm_weight.dtype in (torch.bfloat16, torch.float32)
    expect(fits, op, f"norm_weight must be [D] bfloat16 or float32, got {describe(norm_weight)}")
    expect(ratio >= 1, op, f"ratio must be at least 1, got {ratio}")
    for name, tensor, tail in (
        ("state", state, (halves * ratio, 2, width)),
        ("kv", kv, (width,)),
        ("score", score, (width,)),
        ("ape", ape, (ratio, width)),
    ):
        leading = {"state": ["B"], "ape": []}.get(name, ["B", "S"])
        fits = tensor.dim() == len(leading) + len(tail) and tuple(tensor.shape[len(leading) :]) == tail
        wanted = f"[{', '.join([*leading, *map(str, tail)])}] float32 for ratio {ratio} and D = {dim}"
        expect(fits and tensor.dtype == torch.float32, op, f"{name} must be {wanted}, got {describe(tensor)}")


def _check_pool(op: str, pool: Tensor, block_table: Tensor, page: int, dtype: torch.dtype) -> None:
    wanted = f"[pages, page stride >= {page}] {str(dtype).removeprefix('torch.')}"
    fits = pool.dim() == 2 and pool.dtype == dtype and pool.shape[1] >= page
    expect(fits, op, f"pool must be {wanted}, got {describe(pool)}")
    fits = block_table.dim() == 2 and block_table.dtype == torch.int32
    expect(fits, op, f"block_table must be [B, max_pages] int32, got {describe(block_table)}")


def _check_kv(
    op: str,
    halves: int,
    state,
    pool,
    kv,
    score,
    ape,
    norm_weight,
    rope_table,
    block_table,
    positions,
    eps,
    ratio,
    page_size,
) -> None:
    _check_rows(op, halves, state, kv, score, ape, norm_weight, ratio)
    expect_rope(op, norm_weight, rope_table, positions)
    dim, rope_dim = norm_weight.shape[0], rope_table.shape[1]
    if pool.dtype == torch.float32:
        return _check_pool(op, pool, block_table, page_size * dim, torch.float32)
    nope = dim - rope_dim
    expect(nope % pages.KV_GROUP == 0, op, f"D - R must be a multiple of {pages.KV_GROUP} in a packed pool, got {nope}")
    _check_pool(op, pool, block_table, page_size * sum(pages.kv_entry_bytes(dim, rope_dim)), torch.uint8)


def _check_key(
    op: str,
    form: str,
    state,
    pool,
    kv,
    score,
    ape,
    norm_weight,
    rope_table,
    block_table,
    positions,
    eps,
    ratio,
    page_size,
) -> None:
    _check_rows(op, 2, state, kv, score, ape, norm_weight, ratio)
    expect_rope(op, norm_weight, rope_table, positions)
    dim = norm_weight.shape[0]
    if form == "plain":
        return _check_pool(op, pool, block_table, page_size * dim, torch.float32)
    fits = dim & (dim - 1) == 0 and dim % pages.INDEX_GROUP == 0
    expect(fits, op, f"D must be a power of two and a multiple of {pages.INDEX_GROUP}, got {dim}")
    _check_pool(op, pool, block_table, pages.index_page_bytes(page_size, dim, fp8=form == "fp8"), torch.uint8)


def _define(name: str, summary: str, insert: Callable, check: Callable):
    reference = partial(_compress_append, insert)
    reference.__doc__ = summary
    return define_mutating(f"{name}({ARGUMENTS}) -> ()", reference=reference, check=check)


# width 2D, slots 2 * ratio; pool: packed KV or plain
csa_compress_append = _define(
    "csa_compress_append",
    "CSA: keep new tokens, write the KV entry of every group they complete, pooled with the group before.",
    pages.write_kv,
    partial(_check_kv, "csa_compress_append", 2),
)
# width D, slots ratio; pool: packed KV or plain
hca_compress_append = _define(
    "hca_compress_append",
    "HCA: keep new tokens, write the KV entry of every group they complete.",
    pages.write_kv,
    partial(_check_kv, "hca_compress_append", 1),
)
# width 2D, slots 2 * ratio, D the index dimension; pool: plain keys, not rotated by a Hadamard transform
index_compress_append_plain = _define(
    "index_compress_append_plain",
    "The same as csa_compress_append for index keys, in fp32.",
    _insert_key_plain,
    partial(_check_key, "index_compress_append_plain", "plain"),
)
# the same, Hadamard, packed FP8 keys
index_compress_append_fp8 = _define(
    "index_compress_append_fp8",
    "The same as csa_compress_append for index keys, after a Hadamard transform, in FP8 with an fp32 scale.",
    _insert_key_fp8,
    partial(_check_key, "index_compress_append_fp8", "fp8"),
)
# the same, Hadamard, packed FP4 keys
index_compress_append_fp4 = _define(
    "index_compress_append_fp4",
    "The same as csa_compress_append for index keys, after a Hadamard transform, in FP4, UE8M0 scale per 32.",
    _insert_key_fp4,
    partial(_check_key, "index_compress_append_fp4", "fp4"),
)
