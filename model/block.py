"""One transformer block on `hc_mult` residual streams: attention and MoE, each between an mHC pre and post.

What a sub-layer returns is mixed back by the sub-layer behind it, also from one block to the next: post, pre and norm
are one operator. So what passes between blocks is a `Flow`.
Equations: DeepSeek-V4 report, section 2.2 (manifold-constrained hyper-connections).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsv4_ops import ops
from model.attention import make_attention
from model.config import ModelConfig
from model.linear import Binding, parameter
from model.moe import MoE
from model.state import LayerState
from model.storage import Storage


class Flow(NamedTuple):
    """Residual streams, and what is still to be mixed into them: the streams of the next sub-layer are hc_post(*flow).

    f [B, S, d]; streams [B, S, n, d]; post [B, S, n] f32; comb [B, S, n, n] f32
    """

    f: Tensor
    streams: Tensor
    post: Tensor
    comb: Tensor

    def mixed(self) -> Tensor:
        return ops.hc_post(*self)


class HyperConnection(nn.Module):
    """Parameters of one mHC site: they turn the streams into the weights of pre, post and the stream mixing."""

    def __init__(self, name: str, config: ModelConfig, storage: Storage):
        super().__init__()
        self.name, streams = name, config.hc_mult
        rows, width = (2 + streams) * streams, streams * config.hidden_size
        self.fn = parameter(rows, width, dtype=torch.float32, device=storage.device)
        self.scale = parameter(3, dtype=torch.float32, device=storage.device)
        self.base = parameter(rows, dtype=torch.float32, device=storage.device)
        self.norm_eps, self.eps, self.iterations = config.rms_norm_eps, config.hc_eps, config.hc_sinkhorn_iters

    def forward(self, flow: Flow, norm: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The streams after the last sub-layer, the normed input of the next one, and its post and comb."""
        return ops.hc_post_pre_rms_norm(
            *flow, self.fn, self.scale, self.base, norm, self.norm_eps, self.eps, self.iterations
        )

    def bindings(self) -> list[Binding]:
        return [Binding((f"{self.name}_{part}",), getattr(self, part)) for part in ("fn", "scale", "base")]


class Block(nn.Module):
    """Flow -> flow. Blocks of one kind share a compiled graph: what differs is in their tensors."""

    def __init__(
        self, name: str, config: ModelConfig, kind: str, ratio: int, hashed: bool, storage: Storage, index_format: str
    ):
        super().__init__()
        self.hc_attn = HyperConnection(f"{name}.hc_attn", config, storage)
        self.hc_ffn = HyperConnection(f"{name}.hc_ffn", config, storage)
        self.attn_norm = parameter(config.hidden_size, dtype=storage.dtype, device=storage.device)
        self.ffn_norm = parameter(config.hidden_size, dtype=storage.dtype, device=storage.device)
        self.attn = make_attention(f"{name}.attn", kind, ratio, config, storage, index_format)
        self.ffn = MoE(f"{name}.ffn", config, hashed, storage)
        self.name = name

    def forward(self, flow: Flow, positions: Tensor, fixed_ids: Tensor, rope_table: Tensor, state: LayerState) -> Flow:
        """positions [B, S] int32 (-1: no token), fixed_ids [B, S, k] int32 (-1: the router chooses)."""
        streams, x, post, comb = self.hc_attn(flow, self.attn_norm)
        flow = Flow(self.attn(x, positions, rope_table, state), streams, post, comb)
        streams, x, post, comb = self.hc_ffn(flow, self.ffn_norm)
        return Flow(self.ffn(x, fixed_ids), streams, post, comb)

    def bindings(self) -> list[Binding]:
        return [
            *self.hc_attn.bindings(),
            *self.hc_ffn.bindings(),
            Binding((f"{self.name}.attn_norm.weight",), self.attn_norm),
            Binding((f"{self.name}.ffn_norm.weight",), self.ffn_norm),
            *self.attn.bindings(),
            *self.ffn.bindings(),
        ]
