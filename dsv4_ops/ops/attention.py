"""Sparse attention over paged pools: one softmax over the window and, in compressed layers, compressed entries.

Key and value are the same vector, shared by all heads. With scores s = q . k / sqrt(D) over the keys that a row sees,
and the head's sink z, which takes part in the denominator only:

  o = sum(exp(s) k) / (sum(exp(s)) + exp(z)), turned back by the row's position (inverse rope);  lse = log(sum(exp(s)))

A row sees three kinds of keys. Window: position p of max(0, pos - window + 1) .. pos, entry p % ring of the window
pool. Selected: the compressed entries that `indices` names. Compressed: every compressed entry w < (pos + 1) // ratio.
A row that sees nothing gives o = 0 and lse = -inf; a row at position -1 has no window and no compressed entries (and
the caller gives it no indices). What lies in entries that no row sees is not used: it may be NaN.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dsv4_ops.ops.attention_workspace import workspace_compressed, workspace_selected, workspace_window
from dsv4_ops.ops.norm import expect_rope
from dsv4_ops.ops.pages import KV_GROUP, kv_entry_bytes, read_kv
from dsv4_ops.ops.rope import apply_rope
from dsv4_ops.registry import Inline, define, describe, expect

ROWS_AT_ONCE = 64  # query rows of a sequence handled together: bounds the memory of a long chunk

Keys = tuple[Tensor, Tensor]  # keys [B, N, D] seen by all rows or [B, S, N, D] of each row; visible [B, S, N] bool


def window_keys(pool: Tensor, table: Tensor, positions: Tensor, window: int, page_size: int, dims: tuple) -> Keys:
    """The span of the ring that the rows of a sequence see: positions[0] - window + 1 .. positions[0] + S - 1."""
    span = torch.arange(1 - window, positions.shape[1], dtype=torch.int32, device=positions.device)
    key_positions = positions[:, :1] + span
    distance = positions[:, :, None] - key_positions[:, None]
    visible = (distance >= 0) & (distance < window) & (key_positions >= 0)[:, None]
    ring = table.shape[1] * page_size
    return read_kv(pool, table, key_positions % ring, page_size, *dims), visible


def compressed_keys(pool: Tensor, table: Tensor, positions: Tensor, ratio: int, page_size: int, dims: tuple) -> Keys:
    """All entries that the block table has room for; entry w is visible from the last position of its block on."""
    entries = torch.arange(table.shape[1] * page_size, dtype=torch.int32, device=positions.device)
    visible = entries < ((positions + 1) // ratio)[..., None]
    return read_kv(pool, table, entries.expand(table.shape[0], -1), page_size, *dims), visible


def attend(q: Tensor, sink: Tensor, rope_table: Tensor, positions: Tensor, parts: list[Keys]) -> tuple[Tensor, Tensor]:
    """Attention of q [B, S, H, D] over all keys of `parts`: o [B, S, H, D] in q's dtype, lse [B, S, H] f32."""
    scores, values = [], []
    for keys, visible in parts:
        seen = visible.any(1) if keys.dim() == 3 else visible
        keys = torch.where(seen[..., None], keys, 0.0)  # a product with weight 0 would let NaN through
        score = rows_times(q.float(), keys.mT) * q.shape[-1] ** -0.5
        scores.append(torch.where(visible[:, :, None], score, -torch.inf))
        values.append(keys)
    largest = torch.cat(scores, -1).amax(-1, keepdim=True)
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    weights = [(score - largest).exp() for score in scores]
    total = torch.cat(weights, -1).sum(-1, keepdim=True)
    o = sum(rows_times(weight, keys) for weight, keys in zip(weights, values, strict=True))
    o = torch.where(total > 0, o / (total + (sink[:, None] - largest).exp()), 0.0)
    lse = (largest + total.log()).squeeze(-1)
    return apply_rope(o, rope_table, positions, inverse=True).to(q.dtype), lse


def rows_times(a: Tensor, b: Tensor) -> Tensor:
    """a [B, S, H, N] @ b, where b is [B, S, N, M] or, the same for all rows, [B, N, M]."""
    return a @ b if b.dim() == 4 else (a.flatten(1, 2) @ b).unflatten(1, a.shape[1:3])


def in_blocks(attend_rows: Callable[[slice], tuple[Tensor, Tensor]], rows: int) -> tuple[Tensor, Tensor]:
    """attend_rows(slice of the S rows) -> (o, lse), block after block."""
    if isinstance(rows, int) and rows <= ROWS_AT_ONCE:
        return attend_rows(slice(None))
    blocks = [attend_rows(slice(row, row + ROWS_AT_ONCE)) for row in range(0, max(rows, 1), ROWS_AT_ONCE)]
    o, lse = zip(*blocks, strict=True)
    return torch.cat(o, 1), torch.cat(lse, 1)


def window_reference(
    q: Tensor,
    window_pool: Tensor,
    sink: Tensor,
    rope_table: Tensor,
    window_table: Tensor,
    positions: Tensor,
    window: int,
    window_page_size: int,
) -> tuple[Tensor, Tensor]:
    """Attention over the window alone."""
    dims = (q.shape[-1], rope_table.shape[1])

    def attend_rows(rows: slice) -> tuple[Tensor, Tensor]:
        at = positions[:, rows]
        near = window_keys(window_pool, window_table, at, window, window_page_size, dims)
        return attend(q[:, rows], sink, rope_table, at, [near])

    return in_blocks(attend_rows, q.shape[1])


def selected_reference(
    q: Tensor,
    window_pool: Tensor,
    compressed_pool: Tensor,
    sink: Tensor,
    rope_table: Tensor,
    window_table: Tensor,
    compressed_table: Tensor,
    indices: Tensor,
    positions: Tensor,
    window: int,
    window_page_size: int,
    compressed_page_size: int,
) -> tuple[Tensor, Tensor]:
    """Attention over the window and, for each row, its own compressed entries `indices`; a negative index is none."""
    dims = (q.shape[-1], rope_table.shape[1])

    def attend_rows(rows: slice) -> tuple[Tensor, Tensor]:
        at, chosen = positions[:, rows], indices[:, rows]
        near = window_keys(window_pool, window_table, at, window, window_page_size, dims)
        far = (read_kv(compressed_pool, compressed_table, chosen, compressed_page_size, *dims), chosen >= 0)
        return attend(q[:, rows], sink, rope_table, at, [near, far])

    return in_blocks(attend_rows, q.shape[1])


def compressed_reference(
    q: Tensor,
    window_pool: Tensor,
    compressed_pool: Tensor,
    sink: Tensor,
    rope_table: Tensor,
    window_table: Tensor,
    compressed_table: Tensor,
    positions: Tensor,
    window: int,
    ratio: int,
    window_page_size: int,
    compressed_page_size: int,
) -> tuple[Tensor, Tensor]:
    """Attention over the window and every compressed entry that is complete at the row's position."""
    dims = (q.shape[-1], rope_table.shape[1])
    entries, visible = compressed_keys(compressed_pool, compressed_table, positions, ratio, compressed_page_size, dims)

    def attend_rows(rows: slice) -> tuple[Tensor, Tensor]:
        at = positions[:, rows]
        near = window_keys(window_pool, window_table, at, window, window_page_size, dims)
        return attend(q[:, rows], sink, rope_table, at, [near, (entries, visible[:, rows])])

    return in_blocks(attend_rows, q.shape[1])


def expect_pool(op: str, name: str, pool: Tensor, table: Tensor, page_size: int, head_dim: int, rope_dim: int) -> None:
    """Raise unless pool and block table are a KV pool of this page size and these dimensions."""
    plain, nope = pool.dtype == torch.float32, head_dim - rope_dim
    page = page_size * (head_dim if plain else sum(kv_entry_bytes(head_dim, rope_dim)))
    fits = pool.dim() == 2 and pool.dtype in (torch.uint8, torch.float32) and page_size > 0 and pool.shape[1] >= page
    wanted = f"[pages, page stride >= {page}] uint8 (packed) or float32 (plain)"
    expect(fits, op, f"{name}_pool must be {wanted} for pages of {page_size} entries, got {describe(pool)}")
    wanted = f"a multiple of {KV_GROUP}; use a float32 pool for other sizes"
    expect(plain or nope % KV_GROUP == 0, op, f"D - R of a packed pool must be {wanted}, got {head_dim} - {rope_dim}")
    fits = table.dim() == 2 and table.dtype == torch.int32
    expect(fits, op, f"{name}_table must be [B, pages of a sequence] int32, got {describe(table)}")


def check_attention(
    op: str,
    q: Tensor,
    window_pool: Tensor,
    sink: Tensor,
    rope_table: Tensor,
    window_table: Tensor,
    positions: Tensor,
    window: int,
    window_page_size: int,
) -> None:
    fits = q.dim() == 4 and q.dtype in (torch.bfloat16, torch.float32)
    expect(fits, op, f"q must be [B, S, H, D] bfloat16 or float32, got {describe(q)}")
    fits = sink.dim() == 1 and sink.shape[0] == q.shape[2] and sink.dtype == torch.float32
    expect(fits, op, f"sink must be [{q.shape[2]}] float32, one logit for each head, got {describe(sink)}")
    expect_rope(op, q, rope_table, positions)
    rows = q.shape[1]
    expect(positions.shape[1] == rows, op, f"positions must be [B, {rows}] int32, got {describe(positions)}")
    expect_pool(op, "window", window_pool, window_table, window_page_size, q.shape[-1], rope_table.shape[1])
    ring, needed = window_table.shape[1] * window_page_size, window + rows - 1
    fix = "give each sequence more pages or split the chunk"
    expect(ring >= needed, op, f"a ring of {ring} entries is shorter than window + S - 1 = {needed}: {fix}")


def check_window(op: str, q: Tensor, *others) -> None:
    check_attention(op, q, *others)


def check_selected(op: str, q: Tensor, *others) -> None:
    window_pool, pool, sink, rope_table, window_table, table, indices, positions, window, window_page, page = others
    check_attention(op, q, window_pool, sink, rope_table, window_table, positions, window, window_page)
    expect_pool(op, "compressed", pool, table, page, q.shape[-1], rope_table.shape[1])
    fits = indices.dim() == 3 and indices.dtype == torch.int32 and indices.shape[1] == q.shape[1]
    expect(fits, op, f"indices must be [B, {q.shape[1]}, k] int32 (negative: none), got {describe(indices)}")


def check_compressed(op: str, q: Tensor, *others) -> None:
    window_pool, pool, sink, rope_table, window_table, table, positions, window, ratio, window_page, page = others
    check_attention(op, q, window_pool, sink, rope_table, window_table, positions, window, window_page)
    expect_pool(op, "compressed", pool, table, page, q.shape[-1], rope_table.shape[1])
    expect(ratio > 0, op, f"ratio must be the positive number of tokens of a compressed entry, got {ratio}")


def alloc_attention(q: Tensor, *others) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


# q [B, S, H, D] bf16 | f32, window_pool [pages, page stride] uint8 | f32, sink [H] f32, rope_table [max_pos, R] f32,
# window_table [B, pages of a sequence] int32, positions [B, S] int32 -> o [B, S, H, D] of q's dtype, lse [B, S, H] f32
sparse_attention_window = define(
    "sparse_attention_window(Tensor q, Tensor window_pool, Tensor sink, Tensor rope_table, Tensor window_table, "
    "Tensor positions, int window, int window_page_size) -> (Tensor o, Tensor lse)",
    alloc=alloc_attention,
    reference=window_reference,
    check=partial(check_window, "sparse_attention_window"),
    inline=Inline.STATIC_SHAPES,
    workspace=workspace_window,
)

# as above, and compressed_pool [pages, page stride] uint8 | f32, compressed_table [B, pages of a sequence] int32,
# indices [B, S, k] int32: the compressed entries of each row in any order, negative: none
sparse_attention_selected = define(
    "sparse_attention_selected(Tensor q, Tensor window_pool, Tensor compressed_pool, Tensor sink, Tensor rope_table, "
    "Tensor window_table, Tensor compressed_table, Tensor indices, Tensor positions, int window, "
    "int window_page_size, int compressed_page_size) -> (Tensor o, Tensor lse)",
    alloc=alloc_attention,
    reference=selected_reference,
    check=partial(check_selected, "sparse_attention_selected"),
    inline=Inline.STATIC_SHAPES,
    workspace=workspace_selected,
)

# as above without indices: a row sees compressed entries 0 .. (position + 1) // ratio - 1
sparse_attention_compressed = define(
    "sparse_attention_compressed(Tensor q, Tensor window_pool, Tensor compressed_pool, Tensor sink, "
    "Tensor rope_table, Tensor window_table, Tensor compressed_table, Tensor positions, int window, int ratio, "
    "int window_page_size, int compressed_page_size) -> (Tensor o, Tensor lse)",
    alloc=alloc_attention,
    reference=compressed_reference,
    check=partial(check_compressed, "sparse_attention_compressed"),
    inline=Inline.STATIC_SHAPES,
    workspace=workspace_compressed,
)
