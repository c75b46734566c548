"""The router: which experts a row goes to and with which weights."""

import torch
from torch import Tensor
from torch.nn.functional import linear, softplus

from dsv4_ops.ops.norm import expect_activation
from dsv4_ops.registry import Inline, define, describe, expect


def gate_reference(
    x: Tensor, weight: Tensor, bias: Tensor, fixed_ids: Tensor, k: int, route_scale: float
) -> tuple[Tensor, Tensor]:
    """The k experts with the largest sqrt(softplus(logit)) + bias, largest first, lowest id on ties; all in fp32.

    A slot with fixed_ids >= 0 (row of a hash table, replay of a recorded choice) takes that expert instead. The
    weights are the scores without the bias, divided by their sum.
    """
    score = softplus(linear(x.float(), weight.float())).sqrt()
    best = (score + bias).argsort(dim=-1, descending=True, stable=True)[..., :k]
    ids = torch.where(fixed_ids >= 0, fixed_ids.long(), best)
    chosen = score.gather(-1, ids)
    return ids.int(), chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * route_scale


def check_gate(x: Tensor, weight: Tensor, bias: Tensor, fixed_ids: Tensor, k: int, route_scale: float) -> None:
    expect_activation(x, "gate", "x")
    expect_activation(weight, "gate", "weight", x.shape[-1])
    experts = weight.shape[0]
    fits = bias.dtype == torch.float32 and tuple(bias.shape) == (experts,)
    expect(fits, "gate", f"bias must be [{experts}] float32, one for each row of weight, got {describe(bias)}")
    expect(0 < k <= experts, "gate", f"k must be between 1 and the {experts} experts, got {k}")
    expect_slots("gate", "fixed_ids", fixed_ids, torch.int32, x, k)


def expect_slots(op: str, name: str, tensor: Tensor, dtype: torch.dtype, x: Tensor, k: int) -> None:
    """Raise unless tensor [T, k] has one element for each slot of the rows of x [T, ...]."""
    fits = tensor.dtype == dtype and tensor.dim() == x.dim() and tensor.shape[-1] == k
    wanted = f"[T, {k}] {str(dtype).removeprefix('torch.')} for x {describe(x)}"
    expect(fits, op, f"{name} must be {wanted}, got {describe(tensor)}")


def alloc_gate(x: Tensor, weight: Tensor, bias: Tensor, fixed_ids: Tensor, k: int, route_scale: float):
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape, dtype=torch.int32), x.new_empty(shape, dtype=torch.float32)


# x [T, d] bf16 | f32, weight [E, d] bf16 | f32, bias [E] f32, fixed_ids [T, k] int32 (-1: choose)
# -> ids [T, k] int32, weights [T, k] f32
gate = define(
    "gate(Tensor x, Tensor weight, Tensor bias, Tensor fixed_ids, int k, float route_scale) "
    "-> (Tensor ids, Tensor weights)",
    alloc=alloc_gate,
    reference=gate_reference,
    check=check_gate,
    inline=Inline.ALWAYS,
)
