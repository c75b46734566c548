"""RMS norm, gated activation, and what happens to queries and keys between their projections and attention."""

from collections.abc import Iterator

from benchmarks.case import Case
from benchmarks.floors import Traffic
from benchmarks.inputs import Inputs
from benchmarks.peers import kernel
from benchmarks.shapes import Widths, batch_and_rows
from dsv4_ops.ops.pages import kv_entry_bytes
from dsv4_ops.registry import TABLE

EPS = 1e-6


def position_bytes(w: Widths, tokens: int) -> int:
    """Positions and the rows of the rope table at them."""
    return tokens * (4 + 4 * w.rope_dim)


def table_bytes(batch: int, rows: int, page_size: int) -> int:
    """Entries of a block table that consecutive rows need."""
    return 4 * batch * -(-rows // page_size)


def window_table(w: Widths, i: Inputs, batch: int, rows: int):
    """Block table of rings that hold the window and the rows of one call."""
    return i.block_table(batch, w.sliding_window + rows - 1, w.page_size)


def positions(w: Widths, i: Inputs, batch: int, rows: int):
    """The last tokens of sequences of different lengths."""
    return i.positions(batch, rows, w.context - 1, apart=w.hca_ratio)


def cases(w: Widths, tokens: int) -> Iterator[Case]:
    batch, rows = batch_and_rows(tokens)
    dim, elements = w.hidden_size, tokens * w.hidden_size
    yield Case(
        "rms_norm", tokens, f"dim {dim}", Traffic(2 * elements + 2 * dim, 2 * elements),
        lambda i: (i.normal(batch, rows, dim), i.norm_weight(dim), EPS),
        ((kernel("vllm_rms_norm", m=tokens, n=dim),),),
    )  # fmt: skip
    routed, inner = tokens * w.num_experts_per_tok, w.moe_intermediate_size
    yield Case(
        "swiglu", tokens, f"I {inner}, {routed} rows", Traffic(4 * routed * inner + 4 * routed, 2 * routed * inner),
        lambda i: (i.normal(routed, 2 * inner, scale=3.0), i.uniform(routed), w.swiglu_limit),
        tuple(
            (kernel(name, m=routed, I=inner),) for name in ("sgl_silu_and_mul_clamp", "vllm_silu_and_mul_with_clamp")
        ),
    )  # fmt: skip
    yield from query_and_key_cases(w, tokens)


def query_and_key_cases(w: Widths, tokens: int) -> Iterator[Case]:
    batch, rows = batch_and_rows(tokens)
    heads, width = w.num_attention_heads, w.head_dim
    at, query = position_bytes(w, tokens), 2 * tokens * heads * width
    entries = tokens * sum(kv_entry_bytes(width, w.rope_dim))
    key = Traffic(2 * tokens * width + 2 * width + table_bytes(batch, rows, w.page_size), entries)

    def queries(i: Inputs):
        return i.normal(batch, rows, heads, width)

    def key_and_tables(i: Inputs) -> tuple:
        table = window_table(w, i, batch, rows)
        pool = i.kv_pool(table, w.page_size, width, w.rope_dim)
        rope = i.rope_table(w.rope_dim, w.context)
        rest = (i.normal(batch, rows, width), i.norm_weight(width), rope, table, positions(w, i, batch, rows))
        return pool, (*rest, EPS, w.page_size)

    def make_query(i: Inputs) -> tuple:
        return queries(i), i.rope_table(w.rope_dim, w.context), positions(w, i, batch, rows), EPS

    def make_key(i: Inputs) -> tuple:
        pool, rest = key_and_tables(i)
        return pool, *rest

    def make_both(i: Inputs) -> tuple:
        pool, rest = key_and_tables(i)
        return pool, queries(i), *rest

    sgl_query = kernel("sgl_fused_q_norm_rope", m=tokens, h=heads)
    sgl_key = kernel("sgl_fused_k_norm_rope_flashmla", m=tokens)
    yield Case("q_norm_rope", tokens, f"H {heads}", Traffic(query + at, query), make_query, ((sgl_query,),))
    yield Case("kv_norm_rope_append", tokens, f"D {width}", key + Traffic(at, 0), make_key, ((sgl_key,),))
    if "qkv_norm_rope_append" in TABLE:
        both = (sgl_query, sgl_key), (kernel("vllm_fused_qnorm_rope_kv_insert", m=tokens, h=heads),)
        yield Case("qkv_norm_rope_append", tokens, f"H {heads}", key + Traffic(query + at, query), make_both, both)
