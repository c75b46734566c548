"""The lightning indexer: which compressed entries a query attends to.

    score[t, e] = sum_h w[t, h] * relu(q[t, h] . k[e])    for visible entries, e < (t + 1) // ratio; -inf for others
    selection   = the k best visible entries of a query, ties to the lowest index, in ascending order, then -1

Queries are rotated (RoPE), in the packed formats also by a Hadamard transform, and quantised like the keys: FP8 with
one scale for each head, folded into w (it is positive, so relu lets it through), or FP4 with a UE8M0 scale for each
group of 32. The transform is orthogonal: left out on both sides it changes scores only through the rounding, left out
on one side it scrambles them. The plain form, for exact mode, neither transforms nor quantises.

Shapes: q [B, S, Hi, Di] bf16|f32, weights [B, S, Hi] bf16|f32 (output of their projection; rounded to the dtype of q),
rope_table f32 [max_pos, R], w f32 [B, S, Hi] = weights * Di^-0.5 * Hi^-0.5, key_pool [pages, page_stride] uint8
(packed) | f32 (plain), block_table int32 [B, max_pages], positions int32 [B, S] (-1: no token, it sees nothing).
C = max_pages * page_size.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dsv4_ops.ops import pages
from dsv4_ops.ops.formats import FP8, hadamard
from dsv4_ops.ops.norm import expect_activation, expect_rope
from dsv4_ops.ops.quant import dequant_mxfp4_reference, quant_fp8_fp32_scale_reference, quant_mxfp4_reference
from dsv4_ops.ops.rope import apply_rope
from dsv4_ops.registry import Inline, define, describe, expect

WORKSPACE_BYTES = 64 << 20  # of a selection on CUDA, at any batch and context
QUERY_BLOCK = 64  # query rows scored at a time: bounds the [B, rows, Hi, C] intermediate of the reference


# ---- queries ----


def _scaled_weights(q: Tensor, weights: Tensor) -> Tensor:
    heads, dim = q.shape[-2:]
    return weights.to(q.dtype).float() * (dim**-0.5 * heads**-0.5)


def _rotated_query(q: Tensor, rope_table: Tensor, positions: Tensor) -> Tensor:
    """RoPE, then Hadamard, each rounded to bf16 like the index keys."""
    roped = apply_rope(q.to(torch.bfloat16).float(), rope_table, positions).to(torch.bfloat16)
    return hadamard(roped.float()).to(torch.bfloat16)


def index_query_plain_reference(q: Tensor, weights: Tensor, rope_table: Tensor, positions: Tensor):
    """Index queries in fp32: RoPE; scaled head weights."""
    return apply_rope(q.float(), rope_table, positions).contiguous(), _scaled_weights(q, weights).contiguous()


def index_query_fp8_reference(q: Tensor, weights: Tensor, rope_table: Tensor, positions: Tensor):
    """Index queries in FP8: RoPE, Hadamard, E4M3 with the scale folded into the head weights."""
    q8, scale = quant_fp8_fp32_scale_reference(_rotated_query(q, rope_table, positions), q.shape[-1])
    return q8, (_scaled_weights(q, weights) * scale[..., 0]).contiguous()


def index_query_fp4_reference(q: Tensor, weights: Tensor, rope_table: Tensor, positions: Tensor):
    """Index queries in FP4: RoPE, Hadamard, E2M1 with a UE8M0 scale for each group of 32; scaled head weights."""
    q4, scale = quant_mxfp4_reference(_rotated_query(q, rope_table, positions))
    return q4, scale, _scaled_weights(q, weights).contiguous()


def _check_query(op: str, q: Tensor, weights: Tensor, rope_table: Tensor, positions: Tensor) -> None:
    expect_activation(q, op, "q")
    expect(q.dim() == 4, op, f"q must be [B, S, Hi, Di], got {describe(q)}")
    expect_activation(weights, op, "weights", q.shape[2])
    expect(weights.dim() == 3, op, f"weights must be [B, S, {q.shape[2]}], got {describe(weights)}")
    expect_rope(op, q, rope_table, positions)
    dim = q.shape[-1]
    transforms = dim & (dim - 1) == 0 and dim % pages.INDEX_GROUP == 0
    wanted = f"Di must be a power of two and a multiple of {pages.INDEX_GROUP}"
    expect(op == "index_query_plain" or transforms, op, f"{wanted}, got {dim}")


def _alloc_query_plain(q: Tensor, weights: Tensor, rope_table: Tensor, positions: Tensor):
    return q.new_empty(q.shape, dtype=torch.float32), weights.new_empty(weights.shape, dtype=torch.float32)


def _alloc_query_fp8(q: Tensor, weights: Tensor, rope_table: Tensor, positions: Tensor):
    return q.new_empty(q.shape, dtype=FP8), weights.new_empty(weights.shape, dtype=torch.float32)


def _alloc_query_fp4(q: Tensor, weights: Tensor, rope_table: Tensor, positions: Tensor):
    *rows, dim = q.shape
    codes, scale = (q.new_empty((*rows, size), dtype=torch.uint8) for size in (dim // 2, dim // pages.INDEX_GROUP))
    return codes, scale, weights.new_empty(weights.shape, dtype=torch.float32)


def _define_query(form: str, outputs: str, alloc: Callable, reference: Callable):
    name = f"index_query_{form}"
    return define(
        f"{name}(Tensor q, Tensor weights, Tensor rope_table, Tensor positions) -> ({outputs})",
        alloc=alloc,
        reference=reference,
        check=partial(_check_query, name),
        inline=Inline.ALWAYS,
    )


# y f32 [B, S, Hi, Di], not transformed
index_query_plain = _define_query("plain", "Tensor y, Tensor w", _alloc_query_plain, index_query_plain_reference)
# q8 E4M3 [B, S, Hi, Di]; w carries the scale max(amax, 1e-4) / 448 of each head
index_query_fp8 = _define_query("fp8", "Tensor q8, Tensor w", _alloc_query_fp8, index_query_fp8_reference)
# q4 uint8 [B, S, Hi, Di / 2], scale uint8 [B, S, Hi, Di / 32]
index_query_fp4 = _define_query("fp4", "Tensor q4, Tensor scale, Tensor w", _alloc_query_fp4, index_query_fp4_reference)


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
