"""RMS norm and quantiser: rows of hidden_size and of the query latent. SwiGLU and quantiser: a row for each expert."""

from collections.abc import Iterator

from benchmarks.case import Case
from benchmarks.cases.nvfp4 import nvfp4_bytes
from benchmarks.cases.quant import GROUP, fp8_bytes, mxfp4_bytes
from benchmarks.floors import Traffic
from benchmarks.inputs import Inputs
from benchmarks.peers import Chain, kernel
from benchmarks.shapes import Widths, batch_and_rows
from dsv4_ops.registry import TABLE

EPS = 1e-6


def norm_then_quant(tokens: int, width: int) -> tuple[Chain, ...]:
    """Peers norm and quantise in two kernels."""
    norm = kernel("vllm_rms_norm", m=tokens, n=width)
    quant = ("tk_per_token_cast_fp8", "tl_act_quant_fp8", "vllm_per_token_group_fp8")
    return tuple((norm, kernel(name, m=tokens, n=width)) for name in quant)


def rms_norm_cases(w: Widths, tokens: int, name: str, width: int) -> Iterator[Case]:
    batch, rows = batch_and_rows(tokens)
    elements, shape = tokens * width, f"{name} {width}"
    read, normed = 2 * elements + 2 * width, 2 * elements

    def make(i: Inputs) -> tuple:
        return i.normal(batch, rows, width), i.norm_weight(width), EPS

    yield Case(
        "rms_norm_quant_fp8", tokens, shape, Traffic(read, normed + fp8_bytes(elements)),
        lambda i: (*make(i), GROUP), norm_then_quant(tokens, width),
    )  # fmt: skip
    yield Case("rms_norm_quant_mxfp4", tokens, shape, Traffic(read, normed + mxfp4_bytes(elements)), make)
    yield Case("rms_norm_quant_nvfp4", tokens, shape, Traffic(read, normed + nvfp4_bytes(elements) + 4 * tokens), make)


def swiglu_cases(w: Widths, tokens: int) -> Iterator[Case]:
    rows, inner = tokens * w.num_experts_per_tok, w.moe_intermediate_size
    elements, shape = rows * inner, f"I {inner}, {rows} rows"
    read = 2 * 2 * elements + 4 * rows

    def make(i: Inputs) -> tuple:
        return i.normal(rows, 2 * inner, scale=3.0), i.uniform(rows), w.swiglu_limit

    peers = tuple((kernel(name, m=rows, I=inner),) for name in ("sgl_silu_mul_quant_contig", "tk_swiglu_cast_fp8"))
    forms = (
        ("fp8", fp8_bytes(elements), lambda i: (*make(i), GROUP), peers),
        ("mxfp4", mxfp4_bytes(elements), make, ()),
        ("nvfp4", nvfp4_bytes(elements) + 4 * rows, make, ()),
    )
    for form, written, arguments, chains in forms:
        for name in (f"swiglu_quant_{form}", f"swiglu_interleaved_quant_{form}"):  # gate and up may alternate
            if name in TABLE:
                yield Case(name, tokens, shape, Traffic(read, written), arguments, chains)


def cases(w: Widths, tokens: int) -> Iterator[Case]:
    yield from rms_norm_cases(w, tokens, "dim", w.hidden_size)
    yield from rms_norm_cases(w, tokens, "q rank", w.q_lora_rank)
    yield from swiglu_cases(w, tokens)
