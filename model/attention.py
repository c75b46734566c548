"""Attention of the three block kinds: window; window + selected compressed entries (CSA); window + all of them (HCA).

The projections are shared. What differs is which compressor runs before attention and which entries attention reads.
Projections of one input are one product: of the hidden state wq_a and wkv, and in fp32 all that the compressors project
and the weights of the indexer's heads, which its query rounds. wq_b and the indexer's are two: operators take queries
whose heads lie at one distance over all tokens.
Equations: DeepSeek-V4 report, section 2.3.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsv4_ops import ops
from model.config import ModelConfig
from model.linear import Binding, parameter, quantise
from model.state import WINDOW_PAGE_SIZE, LayerState, compressed_page_size
from model.storage import Storage


class Compressor(nn.Module):
    """Parameters that turn projections of `ratio` tokens into one entry of width `dim`; CSA overlaps two halves."""

    def __init__(self, name: str, config: ModelConfig, dim: int, ratio: int, overlap: bool, storage: Storage):
        super().__init__()
        self.name, self.ratio, self.eps = name, ratio, config.rms_norm_eps
        width = dim * (2 if overlap else 1)
        self.projections = {f"{name}.wkv": width, f"{name}.wgate": width}
        self.ape = parameter(ratio, width, dtype=torch.float32, device=storage.device)
        self.norm = parameter(dim, dtype=storage.dtype, device=storage.device)

    def forward(
        self,
        append: Callable,
        state: Tensor,
        pool: Tensor,
        kv: Tensor,
        score: Tensor,
        rope_table: Tensor,
        table: Tensor,
        positions: Tensor,
    ) -> None:
        """Op `append` keeps the rows of kv and score [B, S, width], the projections, in `state` and writes the entries
        that they complete to `pool`."""
        page_size = compressed_page_size(self.ratio)
        append(
            state, pool, kv, score, self.ape, self.norm, rope_table, table, positions, self.eps, self.ratio, page_size
        )

    def bindings(self) -> list[Binding]:
        return [Binding((f"{self.name}.ape",), self.ape), Binding((f"{self.name}.norm.weight",), self.norm)]


class Indexer(nn.Module):
    """Scores the compressed entries with small heads of their own and keeps the best `index_topk` of each row."""

    def __init__(self, name: str, config: ModelConfig, ratio: int, storage: Storage, index_format: str):
        super().__init__()
        self.heads, self.dim, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.ratio, self.format = ratio, index_format
        self.wq_b = storage.linear(f"{name}.wq_b", self.heads * self.dim, config.q_lora_rank)
        self.compressor = Compressor(f"{name}.compressor", config, self.dim, ratio, True, storage)
        self.projections = self.compressor.projections | {f"{name}.weights_proj": self.heads}

    def forward(
        self,
        qr: tuple[Tensor, ...],
        kv: Tensor,
        score: Tensor,
        weights: Tensor,
        positions: Tensor,
        rope_table: Tensor,
        state: LayerState,
    ) -> Tensor:
        """qr, the quantised query latent, and the projections of x: kv, score and the weights of the heads, which the
        query takes in the dtype of q -> indices [B, S, index_topk] int32, -1 padded."""
        page_size = compressed_page_size(self.ratio)
        append = getattr(ops, f"index_compress_append_{self.format}")
        query = getattr(ops, f"index_query_{self.format}")
        select = getattr(ops, f"index_topk_{self.format}")
        table = state.compressed_table
        self.compressor(append, state.index_state, state.index_pool, kv, score, rope_table, table, positions)
        q = self.wq_b(*qr).unflatten(-1, (self.heads, self.dim))
        query_parts = query(q, weights, rope_table, positions)
        return select(*query_parts, state.index_pool, table, positions, self.ratio, page_size, self.topk)

    def bindings(self) -> list[Binding]:
        return [*self.wq_b.bindings(), *self.compressor.bindings()]


class WindowAttention(nn.Module):
    """Attention over the last `sliding_window` tokens. The other kinds add compressed entries to the same softmax."""

    kind = "window"

    def __init__(self, name: str, config: ModelConfig, storage: Storage):
        super().__init__()
        self.name, self.window, self.eps = name, config.sliding_window, config.rms_norm_eps
        self.heads, self.head_dim, self.groups = config.num_attention_heads, config.head_dim, config.o_groups
        hidden, rank, width = config.hidden_size, config.q_lora_rank, self.heads * self.head_dim
        self.wqkv_a = storage.linears({f"{name}.wq_a": rank, f"{name}.wkv": self.head_dim}, hidden)
        self.wq_b = storage.linear(f"{name}.wq_b", width, rank)
        self.wo_a = storage.grouped_linear(f"{name}.wo_a", self.groups, config.o_lora_rank, width // self.groups)
        self.wo_b = storage.linear(f"{name}.wo_b", hidden, self.groups * config.o_lora_rank)
        self.q_norm = parameter(rank, dtype=storage.dtype, device=storage.device)
        self.kv_norm = parameter(self.head_dim, dtype=storage.dtype, device=storage.device)
        self.attn_sink = parameter(self.heads, dtype=torch.float32, device=storage.device)

    def forward(self, x: Tensor, positions: Tensor, rope_table: Tensor, state: LayerState) -> Tensor:
        """x [B, S, d] (normed), positions [B, S] -> [B, S, d]."""
        qr, kv = self.wqkv_a.split(*quantise(x, self.wqkv_a.activation))
        qr = quantise(ops.rms_norm(qr, self.q_norm, self.eps), self.wq_b.activation)
        q = self.wq_b(*qr).unflatten(-1, (self.heads, self.head_dim))
        ops.qkv_norm_rope_append(
            state.window_pool, q, kv, self.kv_norm, rope_table, state.window_table, positions, self.eps,
            WINDOW_PAGE_SIZE,
        )  # fmt: skip
        o, _ = self.attend(x, q, qr, positions, rope_table, state)
        o = o.flatten(-2).unflatten(-1, (self.groups, -1))
        u = self.wo_a(*quantise(o, self.wo_a.activation))
        return self.wo_b(*quantise(u, self.wo_b.activation))

    def attend(self, x, q, qr, positions, rope_table, state) -> tuple[Tensor, Tensor]:
        return ops.sparse_attention_window(
            q, state.window_pool, self.attn_sink, rope_table, state.window_table, positions,
            self.window, WINDOW_PAGE_SIZE,
        )  # fmt: skip

    def bindings(self) -> list[Binding]:
        linears = (self.wqkv_a, self.wq_b, self.wo_a, self.wo_b)
        return [
            *(binding for linear in linears for binding in linear.bindings()),
            Binding((f"{self.name}.q_norm.weight",), self.q_norm),
            Binding((f"{self.name}.kv_norm.weight",), self.kv_norm),
            Binding((f"{self.name}.attn_sink",), self.attn_sink),
        ]


class SelectedAttention(WindowAttention):
    """CSA: entries of `ratio` tokens, overlapping, of which the indexer selects `index_topk` for each row."""

    kind = "csa"

    def __init__(self, name: str, config: ModelConfig, ratio: int, storage: Storage, index_format: str):
        super().__init__(name, config, storage)
        self.ratio = ratio
        self.compressor = Compressor(f"{name}.compressor", config, self.head_dim, ratio, True, storage)
        self.indexer = Indexer(f"{name}.indexer", config, ratio, storage, index_format)
        projections = self.compressor.projections | self.indexer.projections
        self.to_compress = storage.plain_linear(projections, config.hidden_size)

    def attend(self, x, q, qr, positions, rope_table, state) -> tuple[Tensor, Tensor]:
        kv, score, *index_parts = self.to_compress.fp32_products(x)
        self.compressor(
            ops.csa_compress_append, state.compressor_state, state.compressed_pool, kv, score, rope_table,
            state.compressed_table, positions,
        )  # fmt: skip
        indices = self.indexer(qr, *index_parts, positions, rope_table, state)
        return ops.sparse_attention_selected(
            q, state.window_pool, state.compressed_pool, self.attn_sink, rope_table, state.window_table,
            state.compressed_table, indices, positions, self.window, WINDOW_PAGE_SIZE, compressed_page_size(self.ratio),
        )  # fmt: skip

    def bindings(self) -> list[Binding]:
        parts = (self.to_compress, self.compressor, self.indexer)
        return [*super().bindings(), *(binding for part in parts for binding in part.bindings())]


class CompressedAttention(WindowAttention):
    """HCA: entries of `ratio` tokens; every row attends to all that lie behind it."""

    kind = "hca"

    def __init__(self, name: str, config: ModelConfig, ratio: int, storage: Storage):
        super().__init__(name, config, storage)
        self.ratio = ratio
        self.compressor = Compressor(f"{name}.compressor", config, self.head_dim, ratio, False, storage)
        self.to_compress = storage.plain_linear(self.compressor.projections, config.hidden_size)

    def attend(self, x, q, qr, positions, rope_table, state) -> tuple[Tensor, Tensor]:
        kv, score = self.to_compress.fp32_products(x)
        self.compressor(
            ops.hca_compress_append, state.compressor_state, state.compressed_pool, kv, score, rope_table,
            state.compressed_table, positions,
        )  # fmt: skip
        return ops.sparse_attention_compressed(
            q, state.window_pool, state.compressed_pool, self.attn_sink, rope_table, state.window_table,
            state.compressed_table, positions, self.window, self.ratio, WINDOW_PAGE_SIZE,
            compressed_page_size(self.ratio),
        )  # fmt: skip

    def bindings(self) -> list[Binding]:
        return [*super().bindings(), *self.to_compress.bindings(), *self.compressor.bindings()]


def make_attention(
    name: str, kind: str, ratio: int, config: ModelConfig, storage: Storage, index_format: str
) -> nn.Module:
    if kind == "window":
        return WindowAttention(name, config, storage)
    if kind == "csa":
        return SelectedAttention(name, config, ratio, storage, index_format)
    return CompressedAttention(name, config, ratio, storage)
