"""The lightning indexer: which compressed entries a query attends to.

    score[t, e] = sum_h w[t, h] * relu(q[t, h] . k[e])    for visible entries, e < (t + 1) // ratio; -inf for others
    selection   = the k best visible entries of a query, ties to the lowest index, in ascending order, then -1

Queries and their weights w [B, S, Hi] f32 come from index_query.py, keys from compressor.py, in one form: plain (fp32),
FP8 or FP4.

Shapes: key_pool [pages, page_stride] uint8 (packed) | f32 (plain), block_table int32 [B, max_pages], positions int32
[B, S] (-1: no token, it sees nothing). C = max_pages * page_size.
"""

from functools import partial

import torch
from torch import Tensor

from dsv4_ops.ops import pages
from dsv4_ops.ops.formats import FP8
from dsv4_ops.ops.quant import dequant_mxfp4_reference
from dsv4_ops.registry import define, describe, expect

WORKSPACE_BYTES = 64 << 20  # of a selection on CUDA, at any batch and context
QUERY_BLOCK = 64  # query rows scored at a time: bounds the [B, rows, Hi, C] intermediate of the reference


# ---- scores ----


def _all_entries(block_table: Tensor, page_size: int) -> Tensor:
    capacity = block_table.shape[1] * page_size
    return torch.arange(capacity, device=block_table.device).expand(block_table.shape[0], capacity)


def _visible(positions: Tensor, capacity: int, ratio: int) -> Tensor:
    """[B, S, C] bool: entry e is complete when the token at position t has arrived, e < (t + 1) // ratio."""
    return torch.arange(capacity, device=positions.device) < ((positions + 1) // ratio)[..., None]


def _scores(q: Tensor, w: Tensor, keys: Tensor, positions: Tensor, ratio: int) -> Tensor:
    """q [B, S, Hi, Di] f32, keys [B, C, Di] f32 -> [B, S, C] f32. Keys that nobody sees may hold anything, even NaN."""
    products = torch.einsum("bshd,bcd->bshc", q, keys).relu()
    scores = (products * w[..., None]).sum(2)
    return torch.where(_visible(positions, keys.shape[1], ratio), scores, -torch.inf)


def _blocked_scores(q: Tensor, w: Tensor, keys: Tensor, positions: Tensor, ratio: int) -> Tensor:
    blocks = zip(*(tensor.split(QUERY_BLOCK, dim=1) for tensor in (q, w, positions)), strict=True)
    return torch.cat([_scores(*block[:2], keys, block[2], ratio) for block in blocks], dim=1)


def index_scores_plain_reference(q, w, key_pool, block_table, positions, ratio, page_size):
    """Score of every compressed entry from fp32 queries and keys: sum over heads of w * relu(q . k); unseen: -inf."""
    entries = _all_entries(block_table, page_size)
    keys = pages.gather_entries(key_pool, block_table, entries, page_size, 0, q.shape[-1])
    return _blocked_scores(q, w, keys, positions, ratio)


def index_scores_fp8_reference(q8, w, key_pool, block_table, positions, ratio, page_size):
    """Score of every compressed entry from FP8 queries and keys: sum over heads of w * relu(q . k); unseen: -inf."""
    entries = _all_entries(block_table, page_size)
    keys = pages.read_index_keys_fp8(key_pool, block_table, entries, page_size, q8.shape[-1])
    return _blocked_scores(q8.float(), w, keys, positions, ratio)


def index_scores_fp4_reference(q4, scale, w, key_pool, block_table, positions, ratio, page_size):
    """Score of every compressed entry from FP4 queries and keys: sum over heads of w * relu(q . k); unseen: -inf."""
    entries = _all_entries(block_table, page_size)
    keys = pages.read_index_keys_fp4(key_pool, block_table, entries, page_size, 2 * q4.shape[-1])
    return _blocked_scores(dequant_mxfp4_reference(q4, scale), w, keys, positions, ratio)


def _check_keys(op: str, w, key_pool, dtype: torch.dtype, page: int, block_table, positions, ratio: int) -> None:
    name = str(dtype).removeprefix("torch.")
    fits = key_pool.dim() == 2 and key_pool.dtype == dtype and key_pool.shape[1] >= page
    expect(fits, op, f"key_pool must be [pages, page stride >= {page}] {name}, got {describe(key_pool)}")
    fits = block_table.dim() == 2 and block_table.dtype == torch.int32
    expect(fits, op, f"block_table must be [B, max_pages] int32, got {describe(block_table)}")
    fits = positions.dim() == 2 and positions.dtype == torch.int32
    expect(fits, op, f"positions must be [B, S] int32 (-1: no token), got {describe(positions)}")
    expect(ratio >= 1, op, f"ratio must be at least 1, got {ratio}")
    expect(w.dim() == 3 and w.dtype == torch.float32, op, f"w must be [B, S, Hi] float32, got {describe(w)}")


def _check_q(op: str, name: str, q: Tensor, dtype: torch.dtype, w: Tensor) -> None:
    fits = q.dim() == 4 and q.dtype == dtype and q.shape[2] == w.shape[-1]
    expect(fits, op, f"{name} must be [B, S, {w.shape[-1]}, Di] {dtype}, got {describe(q)}")


def _check_plain(op: str, q, w, key_pool, block_table, positions, ratio, page_size) -> None:
    _check_keys(op, w, key_pool, torch.float32, page_size * q.shape[-1], block_table, positions, ratio)
    _check_q(op, "q", q, torch.float32, w)


def _check_fp8(op: str, q8, w, key_pool, block_table, positions, ratio, page_size) -> None:
    page = pages.index_page_bytes(page_size, q8.shape[-1], fp8=True)
    _check_keys(op, w, key_pool, torch.uint8, page, block_table, positions, ratio)
    _check_q(op, "q8", q8, FP8, w)


def _check_fp4(op: str, q4, scale, w, key_pool, block_table, positions, ratio, page_size) -> None:
    page = pages.index_page_bytes(page_size, 2 * q4.shape[-1], fp8=False)
    _check_keys(op, w, key_pool, torch.uint8, page, block_table, positions, ratio)
    _check_q(op, "q4", q4, torch.uint8, w)
    _check_q(op, "scale", scale, torch.uint8, w)
    groups = 2 * q4.shape[-1] // pages.INDEX_GROUP
    expect(scale.shape[-1] == groups, op, f"scale must be [B, S, Hi, {groups}] uint8, got {describe(scale)}")


def _alloc_scores(q, w, key_pool, block_table, positions, ratio, page_size):
    return w.new_empty((*w.shape[:2], block_table.shape[1] * page_size))


SCORE_ARGUMENTS = "Tensor w, Tensor key_pool, Tensor block_table, Tensor positions, int ratio, int page_size"

# q f32 [B, S, Hi, Di] -> scores f32 [B, S, C]
index_scores_plain = define(
    f"index_scores_plain(Tensor q, {SCORE_ARGUMENTS}) -> (Tensor scores)",
    alloc=_alloc_scores,
    reference=index_scores_plain_reference,
    check=partial(_check_plain, "index_scores_plain"),
)
# q8 E4M3 [B, S, Hi, Di], its scale folded into w
index_scores_fp8 = define(
    f"index_scores_fp8(Tensor q8, {SCORE_ARGUMENTS}) -> (Tensor scores)",
    alloc=_alloc_scores,
    reference=index_scores_fp8_reference,
    check=partial(_check_fp8, "index_scores_fp8"),
)
# q4 uint8 [B, S, Hi, Di / 2], scale uint8 [B, S, Hi, Di / 32]
index_scores_fp4 = define(
    f"index_scores_fp4(Tensor q4, Tensor scale, {SCORE_ARGUMENTS}) -> (Tensor scores)",
    alloc=lambda q4, scale, w, key_pool, block_table, positions, ratio, page_size: _alloc_scores(
        q4, w, key_pool, block_table, positions, ratio, page_size
    ),
    reference=index_scores_fp4_reference,
    check=partial(_check_fp4, "index_scores_fp4"),
)


# ---- selection ----


def top_k_reference(scores: Tensor, positions: Tensor, ratio: int, k: int) -> Tensor:
    """scores [B, S, C] f32 -> int32 [B, S, k]: the k best visible entries, ascending, then -1."""
    capacity = scores.shape[2]
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    visible = _visible(positions, capacity, ratio).gather(2, best)
    best = torch.where(visible, best, capacity).sort(dim=-1).values
    best = torch.nn.functional.pad(torch.where(best < capacity, best, -1), (0, max(k - capacity, 0)), value=-1)
    return best.to(torch.int32).contiguous()


def index_topk_plain_reference(q, w, key_pool, block_table, positions, ratio, page_size, k):
    """The k entries with the largest index_scores_plain, ties to the lowest index, ascending, then -1."""
    scores = index_scores_plain_reference(q, w, key_pool, block_table, positions, ratio, page_size)
    return top_k_reference(scores, positions, ratio, k)


def index_topk_fp8_reference(q8, w, key_pool, block_table, positions, ratio, page_size, k):
    """The k entries with the largest index_scores_fp8, ties to the lowest index, ascending, then -1."""
    scores = index_scores_fp8_reference(q8, w, key_pool, block_table, positions, ratio, page_size)
    return top_k_reference(scores, positions, ratio, k)


def index_topk_fp4_reference(q4, scale, w, key_pool, block_table, positions, ratio, page_size, k):
    """The k entries with the largest index_scores_fp4, ties to the lowest index, ascending, then -1."""
    scores = index_scores_fp4_reference(q4, scale, w, key_pool, block_table, positions, ratio, page_size)
    return top_k_reference(scores, positions, ratio, k)


def _check_topk_plain(q, w, key_pool, block_table, positions, ratio, page_size, k) -> None:
    _check_plain("index_topk_plain", q, w, key_pool, block_table, positions, ratio, page_size)


def _check_topk_fp8(q8, w, key_pool, block_table, positions, ratio, page_size, k) -> None:
    _check_fp8("index_topk_fp8", q8, w, key_pool, block_table, positions, ratio, page_size)


def _check_topk_fp4(q4, scale, w, key_pool, block_table, positions, ratio, page_size, k) -> None:
    _check_fp4("index_topk_fp4", q4, scale, w, key_pool, block_table, positions, ratio, page_size)


def _alloc_topk(q, w, key_pool, block_table, positions, ratio, page_size, k):
    return w.new_empty((*w.shape[:2], k), dtype=torch.int32)


def _topk_workspace(q, w, key_pool, block_table, positions, ratio, page_size, k):
    """Room for as many rows at a time as WORKSPACE_BYTES hold, at least one."""
    row = -(-block_table.shape[1] * page_size // 64) * (64 + 4)  # whole tiles of 64 scores, and maxima of 16
    words = max(min(w.shape[0] * w.shape[1] * row, WORKSPACE_BYTES // 4), row)
    return w.new_empty((words,), dtype=torch.int32)


# the arguments of index_scores_*, and k -> indices int32 [B, S, k]
index_topk_plain = define(
    f"index_topk_plain(Tensor q, {SCORE_ARGUMENTS}, int k) -> (Tensor indices)",
    alloc=_alloc_topk,
    reference=index_topk_plain_reference,
    check=_check_topk_plain,
    workspace=_topk_workspace,
)
index_topk_fp8 = define(
    f"index_topk_fp8(Tensor q8, {SCORE_ARGUMENTS}, int k) -> (Tensor indices)",
    alloc=_alloc_topk,
    reference=index_topk_fp8_reference,
    check=_check_topk_fp8,
    workspace=_topk_workspace,
)
index_topk_fp4 = define(
    f"index_topk_fp4(Tensor q4, Tensor scale, {SCORE_ARGUMENTS}, int k) -> (Tensor indices)",
    alloc=lambda q4, scale, w, key_pool, block_table, positions, ratio, page_size, k: _alloc_topk(
        q4, w, key_pool, block_table, positions, ratio, page_size, k
    ),
    reference=index_topk_fp4_reference,
    check=_check_topk_fp4,
    workspace=lambda q4, scale, *others: _topk_workspace(q4, *others),
)
