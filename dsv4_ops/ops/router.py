"""The router: which experts a row goes to and with which weights.

`gate` is the router product and `gate_topk`. The logits of a row are a name of their own for those who have them from
elsewhere, or want another product before the same choice.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, softplus

from dsv4_ops.ops.norm import expect_activation
from dsv4_ops.registry import Inline, define, describe, expect


def gate_topk_reference(
    logits: Tensor, bias: Tensor, fixed_ids: Tensor, k: int, route_scale: float
) -> tuple[Tensor, Tensor]:
    """The k experts with the largest sqrt(softplus(logit)) + bias, largest first, lowest id on ties; all in fp32.

    A slot with fixed_ids >= 0 (row of a hash table, replay of a recorded choice) takes that expert instead. The
    weights are the scores without the bias, divided by their sum.
    """
    score = softplus(logits).sqrt()
    best = (score + bias).argsort(dim=-1, descending=True, stable=True)[..., :k]
    ids = torch.where(fixed_ids >= 0, fixed_ids.long(), best)
    chosen = score.gather(-1, ids)
    return ids.int(), chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * route_scale


def gate_reference(
    x: Tensor, weight: Tensor, bias: Tensor, fixed_ids: Tensor, k: int, route_scale: float
) -> tuple[Tensor, Tensor]:
    """gate_topk of the logits x . weight^T, in fp32."""
    return gate_topk_reference(linear(x.float(), weight.float()), bias, fixed_ids, k, route_scale)


def check_gate_topk(logits: Tensor, bias: Tensor, fixed_ids: Tensor, k: int, route_scale: float) -> None:
    fits = logits.dim() >= 1 and logits.dtype == torch.float32
    expect(fits, "gate_topk", f"logits must be [T, E] float32, got {describe(logits)}")
    expect_choice("gate_topk", "logits", logits, logits.shape[-1], bias, fixed_ids, k)


def check_gate(x: Tensor, weight: Tensor, bias: Tensor, fixed_ids: Tensor, k: int, route_scale: float) -> None:
    expect_activation(x, "gate", "x")
    expect_activation(weight, "gate", "weight", x.shape[-1])
    expect_choice("gate", "x", x, weight.shape[0], bias, fixed_ids, k)


def expect_choice(op: str, name: str, x: Tensor, experts: int, bias: Tensor, fixed_ids: Tensor, k: int) -> None:
    """Raise unless bias [experts] and fixed_ids [T, k] fit the rows of x, which the message calls `name`."""
    fits = bias.dtype == torch.float32 and tuple(bias.shape) == (experts,)
    expect(fits, op, f"bias must be [{experts}] float32, one for each expert, got {describe(bias)}")
    expect(0 < k <= experts, op, f"k must be between 1 and the {experts} experts, got {k}")
    expect_slots(op, "fixed_ids", fixed_ids, torch.int32, x, k, name)


def expect_slots(op: str, name: str, tensor: Tensor, dtype: torch.dtype, x: Tensor, k: int, rows: str = "x") -> None:
    """Raise unless tensor [T, k] has one element for each slot of the rows of x [T, ...], in messages `rows`."""
    fits = tensor.dtype == dtype and tensor.dim() == x.dim() and tensor.shape[-1] == k
    wanted = f"[T, {k}] {str(dtype).removeprefix('torch.')} for {rows} {describe(x)}"
    expect(fits, op, f"{name} must be {wanted}, got {describe(tensor)}")


def alloc_choice(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape, dtype=torch.int32), x.new_empty(shape, dtype=torch.float32)


def gate_workspace(x: Tensor, weight: Tensor, bias: Tensor, fixed_ids: Tensor, k: int, route_scale: float) -> Tensor:
    """Sums over parts of d, [T, parts, E] f32, with the numbers of csrc/router/router.h."""
    both_bf16 = x.dtype == weight.dtype == torch.bfloat16
    width, rows = x.shape[-1], x.shape[:-1].numel()
    parts = -(-width // (512 if both_bf16 else 128)) if rows <= 256 else 2
    return x.new_empty(rows * parts * weight.shape[0], dtype=torch.float32)


# logits [T, E] f32, bias [E] f32, fixed_ids [T, k] int32 (-1: choose) -> ids [T, k] int32, weights [T, k] f32
gate_topk = define(
    "gate_topk(Tensor logits, Tensor bias, Tensor fixed_ids, int k, float route_scale) -> (Tensor ids, Tensor weights)",
    alloc=lambda logits, bias, fixed_ids, k, route_scale: alloc_choice(logits, k),
    reference=gate_topk_reference,
    check=check_gate_topk,
    inline=Inline.ALWAYS,
)

# x [T, d] bf16 | f32, weight [E, d] bf16 | f32, bias [E] f32, fixed_ids [T, k] int32 (-1: choose)
# -> ids [T, k] int32, weights [T, k] f32
gate = define(
    "gate(Tensor x, Tensor weight, Tensor bias, Tensor fixed_ids, int k, float route_scale) "
    "-> (Tensor ids, Tensor weights)",
    alloc=lambda x, weight, bias, fixed_ids, k, route_scale: alloc_choice(x, k),
    reference=gate_reference,
    check=check_gate,
    inline=Inline.ALWAYS,
    workspace=gate_workspace,
)
