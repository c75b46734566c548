"""Muon for stacks of matrices."""

import torch


class Muon(torch.optim.Optimizer):
    """Muon for stacks of matrices: momentum, then 5 Newton-Schulz steps towards the nearest orthogonal matrix.

    torch.optim.Muon takes 2-D parameters only. `view` maps a parameter to [count, rows, cols], so that experts, heads
    and fused halves are orthogonalised one by one.
    """

    def __init__(self, params: list[dict], lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                buffer = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"]).view(-1, *group["view"])
                update = orthogonalise(update) * max(1.0, group["view"][0] / group["view"][1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update.view_as(p))


def orthogonalise(g: torch.Tensor) -> torch.Tensor:
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).to(g.dtype)
