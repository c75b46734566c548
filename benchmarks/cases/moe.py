"""The routed experts, all of them in memory, or a slice as one of several GPUs that share them has it.

Tokens take experts in turn, so as many as possible are read.
"""

from collections.abc import Iterator

import torch

from benchmarks.case import Case
from benchmarks.cases.gemm import FORMATS, experts, input_bytes, make_input, product, weight_bytes
from benchmarks.floors import Traffic
from benchmarks.inputs import Inputs
from benchmarks.peers import Chain, kernel
from benchmarks.shapes import Widths

TOKENS = (1, 16, 64, 1024, 4096)
SLICES = 8  # ranks that share the experts; the peers were measured with one rank's
LEAST_SLICE_TOKENS = 64  # with fewer a slice has no more than a step with all experts reads
MOST_DENSE_TOKENS = 16  # no released model has experts in bf16


def cases(w: Widths, tokens: int) -> Iterator[Case]:
    counts = [w.n_routed_experts]
    if tokens >= LEAST_SLICE_TOKENS:
        counts.append(w.n_routed_experts // SLICES)
    for form in FORMATS:
        if form != "dense" or tokens <= MOST_DENSE_TOKENS:
            yield from (case(w, tokens, form, count) for count in counts)


def case(w: Widths, tokens: int, form: str, count: int) -> Case:
    dim, inner, k = w.hidden_size, w.moe_intermediate_size, w.num_experts_per_tok
    active = min(count, tokens * k)
    weights = 2 * weight_bytes(form, inner, dim) + weight_bytes(form, dim, inner)
    read = input_bytes(form, tokens, dim) + 8 * tokens * k + active * weights

    def make(i: Inputs) -> tuple:
        ids = (torch.arange(tokens * k, device=i.device) % count).to(torch.int32).view(tokens, k)
        weights = i.uniform(tokens, k)
        return *make_input(i, form, tokens, dim), ids, weights, *experts(i, form, w, count), w.swiglu_limit

    return Case(
        f"moe_{form}", tokens, f"{w.model.capitalize()} E {count}, {active} read",
        Traffic(read, 4 * tokens * dim) + product(form, 6 * tokens * k * dim * inner), make,
        peers(w, tokens, form, active),
    )  # fmt: skip


def peers(w: Widths, tokens: int, form: str, active: int) -> tuple[Chain, ...]:
    """Marlin reads as many experts, whatever lies in memory beside them; DeepGEMM without what is between its two."""
    if form == "fp8":
        w13, w2 = (
            kernel("dg_grouped_fp8_masked", model=w.model, op=op, T=tokens, active=active) for op in ("w13", "w2")
        )
        return ((w13, w2),)
    if form == "mxfp4":
        return ((kernel("vllm_marlin_mxfp4_moe", model=w.model, T=tokens, active=active),),)
    return ()
