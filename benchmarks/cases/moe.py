"""The routed experts of decode steps. Tokens take experts in turn, so as many as possible are read."""

from collections.abc import Iterator

import torch

from benchmarks.case import Case
from benchmarks.cases.gemm import FORMATS, experts, input_bytes, make_input, product, weight_bytes
from benchmarks.floors import Traffic
from benchmarks.inputs import Inputs
from benchmarks.peers import kernel
from benchmarks.shapes import MOST_DECODE_ROWS, Widths


def cases(w: Widths, tokens: int) -> Iterator[Case]:
    if tokens > MOST_DECODE_ROWS:
        return
    dim, inner, k, count = w.hidden_size, w.moe_intermediate_size, w.num_experts_per_tok, w.n_routed_experts
    active = min(count, tokens * k)

    def make(i: Inputs, form: str) -> tuple:
        ids = (torch.arange(tokens * k, device=i.device) % count).to(torch.int32).view(tokens, k)
        weights = i.uniform(tokens, k)
        return *make_input(i, form, tokens, dim), ids, weights, *experts(i, form, w), w.swiglu_limit

    for form in FORMATS:
        weights = 2 * weight_bytes(form, inner, dim) + weight_bytes(form, dim, inner)
        read = input_bytes(form, tokens, dim) + 8 * tokens * k + active * weights
        peers = ()
        if form == "fp8":
            w13, w2 = (kernel("dg_grouped_fp8_masked", model=w.model, op=op, T=tokens) for op in ("w13", "w2"))
            peers = ((w13, w2),)
        elif form == "mxfp4":
            peers = ((kernel("vllm_marlin_mxfp4_moe", model=w.model, T=tokens, active=active),),)
        yield Case(
            f"moe_{form}", tokens, f"E {count}, {active} read",
            Traffic(read, 4 * tokens * dim) + product(form, 6 * tokens * k * dim * inner),
            lambda i, form=form: make(i, form), peers,
        )  # fmt: skip
