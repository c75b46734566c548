"""FP8 and MXFP4: activations [T, hidden_size] bf16."""

from collections.abc import Iterator

from benchmarks.case import Case
from benchmarks.floors import Traffic
from benchmarks.peers import kernel
from benchmarks.shapes import Widths, batch_and_rows

GROUP, MXFP4_GROUP = 128, 32


def fp8_bytes(elements: int, scale_bytes: int = 1) -> int:
    """E4M3 codes and the scales of their groups."""
    return elements + elements // GROUP * scale_bytes


def mxfp4_bytes(elements: int) -> int:
    return elements // 2 + elements // MXFP4_GROUP


def cases(w: Widths, tokens: int) -> Iterator[Case]:
    batch, rows = batch_and_rows(tokens)
    dim, elements = w.hidden_size, tokens * w.hidden_size
    shape, x = f"dim {dim}", 2 * elements
    peers = (
        (kernel("tk_per_token_cast_fp8", m=tokens, n=dim),),
        (kernel("tl_act_quant_fp8", m=tokens, n=dim),),
        (kernel("vllm_per_token_group_fp8", m=tokens, n=dim),),
    )
    yield Case(
        "quant_fp8", tokens, shape, Traffic(x, fp8_bytes(elements)),
        lambda i: (i.normal(batch, rows, dim), GROUP), peers,
    )  # fmt: skip
    yield Case(
        "quant_fp8_fp32_scale", tokens, shape, Traffic(x, fp8_bytes(elements, scale_bytes=4)),
        lambda i: (i.normal(batch, rows, dim), GROUP), peers,
    )  # fmt: skip
    yield Case(
        "dequant_fp8", tokens, shape, Traffic(fp8_bytes(elements), 4 * elements), lambda i: i.fp8(batch, rows, dim)
    )
    yield Case(
        "quant_mxfp4", tokens, shape, Traffic(x, mxfp4_bytes(elements)), lambda i: (i.normal(batch, rows, dim),),
        ((kernel("tl_act_quant_fp4", m=tokens, n=dim),),),
    )  # fmt: skip
    yield Case(
        "dequant_mxfp4", tokens, shape, Traffic(mxfp4_bytes(elements), 4 * elements),
        lambda i: i.mxfp4(batch, rows, dim),
    )  # fmt: skip
