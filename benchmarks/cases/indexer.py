"""Index queries, and scores and selection over the index keys of a long context."""

from collections.abc import Iterator

import torch

from benchmarks.case import Case
from benchmarks.cases.norm import position_bytes, positions
from benchmarks.floors import Traffic
from benchmarks.inputs import Inputs
from benchmarks.peers import Chain, kernel
from benchmarks.shapes import Widths, batch_and_rows
from dsv4_ops.ops.pages import index_page_bytes

MOST_REFERENCE_TOKENS = 128


def query_bytes(w: Widths, tokens: int, form: str) -> int:
    """Codes and scales of quantised index queries and their fp32 head weights."""
    heads, dim = tokens * w.index_n_heads, w.index_head_dim
    return heads * {"plain": 4 * dim, "fp8": dim, "fp4": dim // 2 + dim // 32}[form] + 4 * heads


def make_query(w: Widths, i: Inputs, tokens: int) -> tuple:
    batch, rows = batch_and_rows(tokens)
    heads, dim = w.index_n_heads, w.index_head_dim
    rope = i.rope_table(w.rope_dim, w.context)
    return i.normal(batch, rows, heads, dim), i.normal(batch, rows, heads), rope, positions(w, i, batch, rows)


def quantised_query(w: Widths, i: Inputs, batch: int, form: str) -> tuple:
    """Index queries [B, 1, heads, dim] as the selection takes them, and the head weights."""
    shape = (batch, 1, w.index_n_heads, w.index_head_dim)
    weights = i.uniform(batch, 1, w.index_n_heads)
    if form == "fp4":
        return *i.mxfp4(*shape), weights
    return (
        i.normal(*shape, dtype=torch.float32) if form == "plain" else i.fp8(*shape, group=w.index_head_dim)[0]
    ), weights


def cases(w: Widths, tokens: int) -> Iterator[Case]:
    read = 2 * tokens * w.index_n_heads * (w.index_head_dim + 1) + position_bytes(w, tokens)
    peers = {
        "fp8": (
            (kernel("sgl_fused_q_indexer_rope_had_fp8", m=tokens),),
            (kernel("vllm_fused_indexer_q_rope_fp8", m=tokens),),
        )
    }
    for form in ("plain", "fp8", "fp4"):
        yield Case(
            f"index_query_{form}", tokens, f"{w.index_n_heads} x {w.index_head_dim}",
            Traffic(read, query_bytes(w, tokens, form)), lambda i: make_query(w, i, tokens), peers.get(form, ()),
        )  # fmt: skip
    if tokens <= MOST_REFERENCE_TOKENS:
        for form in ("plain", "fp8", "fp4"):
            yield from key_cases(w, tokens, form)


def key_cases(w: Widths, batch: int, form: str) -> Iterator[Case]:
    """Scores of all keys of a context, and the best of them."""
    entries, dim, heads, k = w.context // w.csa_ratio, w.index_head_dim, w.index_n_heads, w.index_topk
    key = 4 * dim if form == "plain" else index_page_bytes(1, dim, fp8=form == "fp8")
    pages = 4 * entries // w.page_size
    read = batch * (entries * key + pages + 4) + query_bytes(w, batch, form)
    flops = 2 * batch * entries * heads * dim
    work = Traffic(0, 0, fp32_flops=flops) if form == "plain" else Traffic(0, 0, fp8_flops=flops)

    def make(i: Inputs) -> tuple:
        table = i.block_table(batch, entries, w.page_size)
        if form == "plain":
            pool = i.normal(table.numel(), w.page_size * dim, dtype=torch.float32)
        else:
            pool = i.index_pool(table, w.page_size, dim, fp8=form == "fp8")
        query = quantised_query(w, i, batch, form)
        return *query, pool, table, i.positions(batch, 1, w.context - 1), w.csa_ratio, w.page_size

    scores: tuple[Chain, ...] = ((kernel("dg_fp8_paged_mqa_logits", b=batch, n=entries),),) if form == "fp8" else ()
    names = ("vllm_cooperative_topk", "vllm_persistent_topk", "vllm_top_k_per_row_decode")
    best = tuple((kernel(name, rows=batch, n=entries, k=k),) for name in names)
    shape = f"{entries} keys"
    yield Case(f"index_scores_{form}", batch, shape, Traffic(read, 4 * batch * entries) + work, make, scores)
    yield Case(
        f"index_topk_{form}", batch, f"{shape}, k {k}", Traffic(read, 4 * batch * k) + work,
        lambda i: (*make(i), k), tuple(chain + selection for chain in scores for selection in best),
    )  # fmt: skip
