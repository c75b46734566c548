"""Products of the query's second projection, and of the grouped output projection, in every format."""

from collections.abc import Iterator

import torch

from benchmarks.case import Case
from benchmarks.cases.nvfp4 import nvfp4_bytes
from benchmarks.cases.quant import GROUP, fp8_bytes, mxfp4_bytes
from benchmarks.floors import Traffic
from benchmarks.inputs import Inputs
from benchmarks.peers import kernel
from benchmarks.shapes import MOST_DECODE_ROWS, Widths

FORMATS = ("dense", "fp8", "mxfp4", "nvfp4")


def product(form: str, flops: int) -> Traffic:
    """The flops of a product in the narrowest format of a Hopper tensor core that its operands are exact in."""
    narrow = form in ("fp8", "mxfp4")
    return Traffic(0, 0, fp8_flops=flops if narrow else 0, bf16_flops=0 if narrow else flops)


def weight_bytes(form: str, rows: int, columns: int) -> int:
    """A weight of this format with its scales."""
    elements = rows * columns
    return {
        "dense": 2 * elements,
        "fp8": elements + -(-rows // GROUP) * -(-columns // GROUP),
        "mxfp4": mxfp4_bytes(elements),
        "nvfp4": nvfp4_bytes(elements) + 4,
    }[form]


def input_bytes(form: str, rows: int, columns: int) -> int:
    """Rows as a weight of this format multiplies them."""
    elements = rows * columns
    fp8 = fp8_bytes(elements)
    return {"dense": 2 * elements, "fp8": fp8, "mxfp4": fp8, "nvfp4": nvfp4_bytes(elements) + 4 * rows}[form]


def make_input(i: Inputs, form: str, *shape: int) -> tuple:
    if form == "dense":
        return (i.normal(*shape),)
    return i.nvfp4(*shape) if form == "nvfp4" else i.fp8(*shape)


def make_weight(i: Inputs, form: str, *shape: int) -> tuple:
    if form == "dense":
        return (i.normal(*shape, scale=shape[-1] ** -0.5),)
    return getattr(i, f"{form}_weight")(*shape)


def cases(w: Widths, tokens: int) -> Iterator[Case]:
    if tokens > MOST_DECODE_ROWS:
        return
    columns, rows = w.q_lora_rank, w.num_attention_heads * w.head_dim
    groups, group_columns, group_rows = w.o_groups, rows // w.o_groups, w.o_lora_rank
    for form in FORMATS:
        flops = 2 * tokens * rows * columns
        read = input_bytes(form, tokens, columns) + weight_bytes(form, rows, columns)
        yield Case(
            f"linear_{form}", tokens, f"{rows} x {columns}", Traffic(read, 2 * tokens * rows) + product(form, flops),
            lambda i, form=form: (*make_input(i, form, tokens, columns), *make_weight(i, form, rows, columns)),
            ((kernel("dg_fp8_gemm_nt", m=tokens, n=rows, k=columns),),) if form == "fp8" else (),
        )  # fmt: skip
        out = groups * group_rows
        read = input_bytes(form, tokens * groups, group_columns) + weight_bytes(form, out, group_columns)
        yield Case(
            f"grouped_linear_{form}", tokens, f"{groups} x {group_rows} x {group_columns}",
            Traffic(read, 2 * tokens * out) + product(form, 2 * tokens * out * group_columns),
            lambda i, form=form, out=out: (
                *make_input(i, form, tokens, groups, group_columns), *make_weight(i, form, out, group_columns)
            ),
        )  # fmt: skip
    width = w.head_dim * 2  # projections of the CSA compressor
    flops, weight = 2 * tokens * width * w.hidden_size, 2 * width * w.hidden_size
    yield Case(
        "linear_fp32", tokens, f"{width} x {w.hidden_size}",
        Traffic(2 * tokens * w.hidden_size + weight, 4 * tokens * width, bf16_flops=flops),
        lambda i: (
            i.normal(tokens, w.hidden_size), i.normal(width, w.hidden_size, scale=w.hidden_size**-0.5)
        ),
    )  # fmt: skip


def experts(i: Inputs, form: str, w: Widths) -> tuple[torch.Tensor, ...]:
    """w1, w3 and w2 of all experts, each with its scales."""
    inner, dim = w.moe_intermediate_size, w.hidden_size
    shapes = ((inner, dim), (inner, dim), (dim, inner))
    return tuple(part for shape in shapes for part in make_weight(i, form, w.n_routed_experts, *shape))
