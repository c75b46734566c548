"""Products: all that the released models store in FP8, two of them in every format, and those that are kept in fp32."""

from collections.abc import Iterator

import torch

from benchmarks.case import Case
from benchmarks.cases.nvfp4 import nvfp4_bytes
from benchmarks.cases.quant import GROUP, fp8_bytes, mxfp4_bytes
from benchmarks.floors import Traffic
from benchmarks.inputs import Inputs
from benchmarks.peers import Chain, kernel
from benchmarks.shapes import MOST_DECODE_ROWS, Widths

TOKENS = (1, 16, 64, 4096)
FORMATS = ("dense", "fp8", "mxfp4", "nvfp4")
W8A16 = "w8a16"  # dense x and FP8 weights
MOST_HEAD_ROWS = 64  # the head is multiplied with the last token of each sequence


def product(form: str, flops: int) -> Traffic:
    """The flops of a product in the narrowest format of a Hopper tensor core that its operands are exact in."""
    narrow = form in ("fp8", "mxfp4")
    return Traffic(0, 0, fp8_flops=flops if narrow else 0, bf16_flops=0 if narrow else flops)


def weight_bytes(form: str, rows: int, columns: int) -> int:
    """A weight of this format with its scales."""
    elements = rows * columns
    fp8 = elements + -(-rows // GROUP) * -(-columns // GROUP)
    return {
        "dense": 2 * elements,
        "fp8": fp8,
        "mxfp4": mxfp4_bytes(elements),
        "nvfp4": nvfp4_bytes(elements) + 4,
        W8A16: fp8,
    }[form]


def input_bytes(form: str, rows: int, columns: int) -> int:
    """Rows as a weight of this format multiplies them."""
    elements = rows * columns
    fp8 = fp8_bytes(elements)
    return {
        "dense": 2 * elements,
        "fp8": fp8,
        "mxfp4": fp8,
        "nvfp4": nvfp4_bytes(elements) + 4 * rows,
        W8A16: 2 * elements,
    }[form]


def make_input(i: Inputs, form: str, *shape: int) -> tuple:
    if form in ("dense", W8A16):
        return (i.normal(*shape),)
    return i.nvfp4(*shape) if form == "nvfp4" else i.fp8(*shape)


def make_weight(i: Inputs, form: str, *shape: int) -> tuple:
    if form == "dense":
        return (i.normal(*shape, scale=shape[-1] ** -0.5),)
    return i.fp8_weight(*shape) if form == W8A16 else getattr(i, f"{form}_weight")(*shape)


def fp8_products(w: Widths) -> Iterator[tuple[str, int, int]]:
    """(name, rows, columns) of the linears of a block, those with one input as the one product that they are."""
    queries, inner = w.num_attention_heads * w.head_dim, w.moe_intermediate_size
    yield "q_a + kv", w.q_lora_rank + w.head_dim, w.hidden_size
    yield "q_b", queries, w.q_lora_rank
    yield "indexer q_b", w.index_n_heads * w.index_head_dim, w.q_lora_rank
    yield "wo_b", w.hidden_size, w.o_groups * w.o_lora_rank
    yield "shared w1 + w3", 2 * inner, w.hidden_size
    yield "shared w2", w.hidden_size, inner


def fp32_products(w: Widths, tokens: int) -> Iterator[tuple[str, int, int]]:
    """The same of products with bf16 weights that are kept in fp32."""
    yield "CSA compressors", 4 * (w.head_dim + w.index_head_dim) + w.index_n_heads, w.hidden_size
    yield "HCA compressor", 2 * w.head_dim, w.hidden_size
    if tokens <= MOST_HEAD_ROWS:
        yield "head", w.vocab_size, w.hidden_size


def fp8_peers(tokens: int, rows: int, columns: int) -> tuple[Chain, ...]:
    """DeepGEMM at the same shape. Of q_a + kv of Flash only q_a was measured: in decode, the least for both."""
    measured = 1024 if (rows, columns) == (1536, 4096) and tokens <= MOST_DECODE_ROWS else rows
    return ((kernel("dg_fp8_gemm_nt", m=tokens, n=measured, k=columns),),)


def linear(form: str, name: str, tokens: int, rows: int, columns: int) -> Case:
    flops = 2 * tokens * rows * columns
    read = input_bytes(form, tokens, columns) + weight_bytes(form, rows, columns)
    return Case(
        f"linear_{form}", tokens, f"{name} {rows} x {columns}", Traffic(read, 2 * tokens * rows) + product(form, flops),
        lambda i: (*make_input(i, form, tokens, columns), *make_weight(i, form, rows, columns)),
        fp8_peers(tokens, rows, columns) if form == "fp8" else (),
    )  # fmt: skip


def fp32_linear(name: str, tokens: int, rows: int, columns: int) -> Case:
    return Case(
        "linear_fp32", tokens, f"{name} {rows} x {columns}",
        Traffic(2 * (tokens + rows) * columns, 4 * tokens * rows, bf16_flops=2 * tokens * rows * columns),
        lambda i: (i.normal(tokens, columns), i.normal(rows, columns, scale=columns**-0.5)),
    )  # fmt: skip


def grouped_linear(form: str, w: Widths, tokens: int) -> Case:
    groups, rank = w.o_groups, w.o_lora_rank
    columns, rows = w.num_attention_heads * w.head_dim // groups, groups * rank
    read = input_bytes(form, tokens * groups, columns) + weight_bytes(form, rows, columns)
    return Case(
        f"grouped_linear_{form}", tokens, f"wo_a {groups} x {rank} x {columns}",
        Traffic(read, 2 * tokens * rows) + product(form, 2 * tokens * rows * columns),
        lambda i: (*make_input(i, form, tokens, groups, columns), *make_weight(i, form, rows, columns)),
        ((kernel("dg_fp8_einsum_wo_a", b=tokens, h=groups, r=columns, d=rank),),) if form == "fp8" else (),
    )  # fmt: skip


def cases(w: Widths, tokens: int) -> Iterator[Case]:
    for form in (*FORMATS, W8A16):
        for name, rows, columns in fp8_products(w):
            if form == "fp8" or name == "q_b":
                yield linear(form, name, tokens, rows, columns)
        yield grouped_linear(form, w, tokens)
    for name, rows, columns in fp32_products(w, tokens):
        yield fp32_linear(name, tokens, rows, columns)


def experts(i: Inputs, form: str, w: Widths, count: int) -> tuple[torch.Tensor, ...]:
    """w1, w3 and w2 of `count` experts, each with its scales."""
    inner, dim = w.moe_intermediate_size, w.hidden_size
    shapes = ((inner, dim), (inner, dim), (dim, inner))
    return tuple(part for shape in shapes for part in make_weight(i, form, count, *shape))
