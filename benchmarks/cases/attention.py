"""Sparse attention of decode steps: every sequence at the end of a long context."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks.case import Case
from benchmarks.cases.compressor import COMPRESSED_PAGE_TOKENS
from benchmarks.cases.norm import position_bytes, window_table
from benchmarks.floors import Traffic
from benchmarks.inputs import Inputs
from benchmarks.peers import kernel
from benchmarks.shapes import MOST_DECODE_ROWS, Widths
from dsv4_ops.ops.attention_mixed import split_queries
from dsv4_ops.ops.attention_quant import GROUP
from dsv4_ops.ops.pages import kv_entry_bytes


def traffic(w: Widths, batch: int, compressed: int, page_size: int = 1) -> Traffic:
    """Of `batch` queries that see the window and so many compressed entries each. page_size 1: entries are chosen."""
    heads, width = w.num_attention_heads, w.head_dim
    keys, entry = w.sliding_window + compressed, sum(kv_entry_bytes(width, w.rope_dim))
    tables = 4 * (-(-w.sliding_window // w.page_size) + -(-compressed // page_size))
    query = 2 * batch * heads * width
    read = query + batch * (keys * entry + tables) + position_bytes(w, batch) + 4 * heads
    return Traffic(read, query + 4 * batch * heads, bf16_flops=2 * 2 * batch * heads * width * keys)


def mixed_traffic(w: Widths, batch: int, compressed: int) -> Traffic:
    """The same where queries are E4M3 codes with a scale, and products of codes are half of the products."""
    heads, nope = w.num_attention_heads, w.head_dim - w.rope_dim
    plain = traffic(w, batch, compressed)
    fp8 = 2 * batch * heads * nope * (w.sliding_window + compressed)
    read = plain.read - batch * heads * (nope - 4)
    return Traffic(read, plain.written, bf16_flops=plain.bf16_flops - fp8, fp8_flops=fp8)


def quantised(w: Widths, batch: int, plain: Traffic) -> Traffic:
    """The same where codes are written, with a byte for each group of them, instead of bf16."""
    dims = batch * w.num_attention_heads * w.head_dim
    return replace(plain, written=plain.written - dims + dims // GROUP)


def cases(w: Widths, tokens: int) -> Iterator[Case]:
    if tokens > MOST_DECODE_ROWS:
        return
    batch, heads, k = tokens, w.num_attention_heads, w.index_topk
    window, page = w.sliding_window, w.page_size
    far = w.context // w.hca_ratio
    far_page = COMPRESSED_PAGE_TOKENS // w.hca_ratio

    def near(i: Inputs) -> tuple:
        table = window_table(w, i, batch, 1)
        q, sink = i.normal(batch, 1, heads, w.head_dim), i.normal(heads, dtype=torch.float32)
        pool = i.kv_pool(table, page, w.head_dim, w.rope_dim)
        return q, pool, sink, i.rope_table(w.rope_dim, w.context), table, i.positions(batch, 1, w.context - 1)

    def compressed(i: Inputs, entries: int, page_size: int) -> tuple:
        table = i.block_table(batch, entries, page_size)
        return i.kv_pool(table, page_size, w.head_dim, w.rope_dim), table

    def make_window(i: Inputs) -> tuple:
        return *near(i), window, page

    def make_selected(i: Inputs) -> tuple:
        q, pool, sink, rope, table, at = near(i)
        entries = w.context // w.csa_ratio
        far_pool, far_table = compressed(i, entries, page)
        chosen = i.uniform(batch, 1, entries).topk(k).indices.sort(-1).values.to(torch.int32)
        return q, pool, far_pool, sink, rope, table, far_table, chosen, at, window, page, page

    def make_mixed(i: Inputs) -> tuple:
        q, *others = make_selected(i)
        return *split_queries(q, w.rope_dim), *others

    def make_compressed(i: Inputs) -> tuple:
        q, pool, sink, rope, table, at = near(i)
        far_pool, far_table = compressed(i, far, far_page)
        return q, pool, far_pool, sink, rope, table, far_table, at, window, w.hca_ratio, page, far_page

    def peers(*plans: tuple[str, str]):
        return tuple((kernel(name, h=heads, b=batch, plan=plan),) for name, plan in plans)

    def both(op: str, label: str, moved: Traffic, make: Callable[[Inputs], tuple], *plans: tuple[str, str]):
        yield Case(op, tokens, label, moved, make, peers(*plans))
        yield Case(f"{op}_quant_fp8", tokens, label, quantised(w, batch, moved), make)

    shape, flashmla, sglang = f"H {heads}", "flashmla_decode_fp8", "sgl_flashmla_decode_fp8"
    yield from both(
        "sparse_attention_window", shape, traffic(w, batch, 0), make_window, (flashmla, "swa"), (sglang, "swa")
    )
    yield from both(
        "sparse_attention_selected", f"{shape}, k {k}", traffic(w, batch, k), make_selected,
        (flashmla, f"csa{k}_32k"), (sglang, f"csa{k}"),
    )  # fmt: skip
    yield from both(
        "sparse_attention_compressed", f"{shape}, {far} entries", traffic(w, batch, far, far_page), make_compressed,
        (flashmla, "hca_32k"), (sglang, "hca_32k"),
    )  # fmt: skip
    yield Case("sparse_attention_mixed", tokens, f"{shape}, k {k}", mixed_traffic(w, batch, k), make_mixed)
