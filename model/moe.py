"""Mixture of experts: router, routed experts and the shared expert. Equations: DeepSeek-V4 report, section 2.1."""

import torch
from torch import Tensor, nn

from dsv4_ops import ops
from model.config import ModelConfig
from model.linear import FP8_BLOCK, Binding, as_bytes, fp8_binding, parameter, quantise, require_groups
from model.storage import Storage


class Experts(nn.Module):
    """The routed experts of one layer, stacked. Each projection is a tuple of tensors: the weight, then its scales."""

    def __init__(self, name: str, config: ModelConfig, storage: Storage):
        super().__init__()
        self.name, self.storage, self.limit = name, storage, config.swiglu_limit
        self.count = config.n_routed_experts
        self.format = storage.format_of(f"{name}.0.w1")
        self.activation = {"dense": "dense", "fp8": "fp8", "mxfp4": "fp8", "nvfp4": "nvfp4"}[self.format]
        self.op = getattr(ops, f"moe_{self.format}")
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        for projection, rows, columns in (("w1", inner, hidden), ("w3", inner, hidden), ("w2", hidden, inner)):
            for suffix, tensor in self._storage_of(rows, columns).items():
                self.register_parameter(f"{projection}{suffix}", tensor)

    def _storage_of(self, rows: int, columns: int) -> dict[str, nn.Parameter]:
        count, device = self.count, self.storage.device
        if self.format == "dense":
            return {"": parameter(count, rows, columns, dtype=self.storage.dtype, device=device)}
        require_groups(self.name, columns, self.activation)
        if self.format == "fp8":
            blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
            return {
                "": parameter(count, rows, columns, dtype=torch.float8_e4m3fn, device=device),
                "_scale": parameter(count, *blocks, dtype=self.storage.fp8_scale_dtype, device=device),
            }
        packed = parameter(count, rows, columns // 2, dtype=torch.uint8, device=device)
        if self.format == "mxfp4":
            return {"": packed, "_scale": parameter(count, rows, columns // 32, dtype=torch.uint8, device=device)}
        return {
            "": packed,
            "_scale": parameter(count, rows, columns // 16, dtype=torch.float8_e4m3fn, device=device),
            "_global": parameter(count, dtype=torch.float32, device=device),
        }

    def projections(self) -> list[Tensor]:
        suffixes = {"dense": ("",), "fp8": ("", "_scale"), "mxfp4": ("", "_scale"), "nvfp4": ("", "_scale", "_global")}
        return [getattr(self, p + suffix) for p in ("w1", "w3", "w2") for suffix in suffixes[self.format]]

    def forward(
        self, y: Tensor, shared_activation: tuple[Tensor, ...], kind: str, ids: Tensor, weights: Tensor, shared: Tensor
    ) -> Tensor:
        """[B, S, d]: shared + routed sum. `shared_activation`: y quantised as `kind`, used if experts want the same."""
        activation = shared_activation if kind == self.activation else quantise(y, self.activation)
        return self.op(*activation, ids, weights, *self.projections(), self.limit, shared)

    def bindings(self) -> list[Binding]:
        result = []
        for expert in range(self.count):
            for projection in ("w1", "w3", "w2"):
                key, weight = f"{self.name}.{expert}.{projection}", getattr(self, projection)[expert]
                if self.format == "dense":
                    result.append(self.storage.dense_binding(key, weight))
                    continue
                scale = getattr(self, f"{projection}_scale")[expert]
                if self.format == "fp8":
                    result.append(fp8_binding(f"{key}.weight", weight))
                else:
                    result.append(Binding((f"{key}.weight",), weight, as_bytes))
                if self.format == "nvfp4":
                    target = getattr(self, f"{projection}_global")[expert : expert + 1]
                    result.append(Binding((f"{key}.weight_scale",), scale))
                    result.append(Binding((f"{key}.weight_scale_2",), target, lambda tensor: tensor.reshape(1)))
                else:
                    result.append(Binding((f"{key}.scale",), scale, as_bytes))
        return result


class SharedExpert(nn.Module):
    """The expert that every token passes: SwiGLU with the same clamp and route weight 1.

    `ones` [rows] f32, the route weights of as many rows as a call may have, are made with the state.
    """

    def __init__(self, name: str, config: ModelConfig, storage: Storage):
        super().__init__()
        self.limit = config.swiglu_limit
        self.register_buffer("ones", None, persistent=False)
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.w13 = storage.linears({f"{name}.w1": inner, f"{name}.w3": inner}, hidden)
        self.w2 = storage.linear(f"{name}.w2", hidden, inner)

    def forward(self, *activation: Tensor) -> Tensor:
        gate_up = self.w13(*activation)
        batch, rows = gate_up.shape[:-1]
        one = self.ones[: batch * rows].view(batch, rows)
        return self.w2(*quantise(ops.swiglu(gate_up, one, self.limit), self.w2.activation))

    def bindings(self) -> list[Binding]:
        return [*self.w13.bindings(), *self.w2.bindings()]


class MoE(nn.Module):
    """Router, routed experts, shared expert.

    Which experts a token takes may be fixed from outside (`fixed_ids`: the token's row of a hash table, or a recorded
    choice); rows of -1 take the `num_experts_per_tok` best of score + bias. So hash and scored layers are one graph.
    """

    def __init__(self, name: str, config: ModelConfig, hashed: bool, storage: Storage):
        super().__init__()
        self.name, self.hashed = name, hashed
        self.topk, self.route_scale = config.num_experts_per_tok, config.routed_scaling_factor
        device, experts = storage.device, config.n_routed_experts
        self.gate = parameter(experts, config.hidden_size, dtype=storage.dtype, device=device)
        self.bias = nn.Parameter(torch.zeros(experts, dtype=torch.float32, device=device), requires_grad=False)
        self.experts = Experts(f"{name}.experts", config, storage)
        self.shared = SharedExpert(f"{name}.shared_experts", config, storage)

    def forward(self, y: Tensor, fixed_ids: Tensor) -> Tensor:
        """y [B, S, d] (normed), fixed_ids [B, S, k] int32 -> [B, S, d]: routed + shared in fp32, rounded once."""
        ids, weights = ops.gate(y, self.gate, self.bias, fixed_ids, self.topk, self.route_scale)
        kind = self.shared.w13.activation
        activation = quantise(y, kind)
        return self.experts(y, activation, kind, ids, weights, self.shared(*activation))

    def bindings(self) -> list[Binding]:
        gate = [Binding((f"{self.name}.gate.weight",), self.gate)]
        if not self.hashed:
            gate.append(Binding((f"{self.name}.gate.bias",), self.bias))
        return [*gate, *self.experts.bindings(), *self.shared.bindings()]
