"""The router: selection of experts from given logits, and with the product that makes them."""

from collections.abc import Iterator

import torch

from benchmarks.case import Case
from benchmarks.floors import Traffic
from benchmarks.inputs import Inputs
from benchmarks.peers import Chain, kernel
from benchmarks.shapes import Widths, batch_and_rows
from dsv4_ops.registry import TABLE

SELECTIONS = (
    "tk_topk_gate", "tk_gate_sqrtsoftplus_top6", "vllm_dsv4_topk_triton", "vllm_topk_softplus_sqrt",
    "sgl_moe_fused_gate",
)  # fmt: skip


def selection_chains(w: Widths, tokens: int) -> tuple[Chain, ...]:
    return tuple((kernel(name, m=tokens, E=w.n_routed_experts),) for name in SELECTIONS)


def cases(w: Widths, tokens: int) -> Iterator[Case]:
    batch, rows = batch_and_rows(tokens)
    count, k, dim = w.n_routed_experts, w.num_experts_per_tok, w.hidden_size
    table, chosen = 4 * count + 4 * tokens * k, 8 * tokens * k

    def make_rest(i: Inputs) -> tuple:
        bias = i.normal(count, dtype=torch.float32, scale=0.1)
        free = torch.full((batch, rows, k), -1, dtype=torch.int32, device=i.device)
        return bias, free, k, w.routed_scaling_factor

    if "gate_topk" in TABLE:
        yield Case(
            "gate_topk", tokens, f"E {count}", Traffic(4 * tokens * count + table, chosen),
            lambda i: (i.normal(batch, rows, count, dtype=torch.float32), *make_rest(i)), selection_chains(w, tokens),
        )  # fmt: skip
    product = kernel("torch_router_gemm_f32out", m=tokens, E=count, H=dim)
    yield Case(
        "gate", tokens, f"E {count}, dim {dim}",
        Traffic(2 * tokens * dim + 2 * count * dim + table, chosen, bf16_flops=2 * tokens * count * dim),
        lambda i: (i.normal(batch, rows, dim), i.normal(count, dim, scale=dim**-0.5), *make_rest(i)),
        tuple((product, *chain) for chain in selection_chains(w, tokens)),
    )  # fmt: skip
