"""DeepSeek-V4: embedding, blocks, head and the draft (MTP) block, with prefill and decode on one static state."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsv4_ops import ops
from dsv4_ops.ops.rope import rope_table
from model.block import Block, Flow
from model.config import ModelConfig
from model.linear import Binding, parameter, quantise
from model.state import CacheFormat, DecodeState, StateSizes
from model.storage import Storage


class Head(nn.Module):
    """Collapses the streams and normalises; the vocabulary matrix is shared with the draft blocks."""

    def __init__(self, prefix: str, norm_key: str, config: ModelConfig, storage: Storage):
        super().__init__()
        self.prefix, self.norm_key = prefix, norm_key
        streams, hidden, device = config.hc_mult, config.hidden_size, storage.device
        self.fn = parameter(streams, streams * hidden, dtype=torch.float32, device=device)
        self.scale = parameter(1, dtype=torch.float32, device=device)
        self.base = parameter(streams, dtype=torch.float32, device=device)
        self.norm = parameter(hidden, dtype=storage.dtype, device=device)
        self.norm_eps, self.hc_eps = config.rms_norm_eps, config.hc_eps

    def forward(self, streams: Tensor, vocabulary: Tensor) -> Tensor:
        """streams [B, S, n, d] -> logits [B, S, vocab] fp32."""
        x = ops.hc_head(streams, self.fn, self.scale, self.base, self.norm_eps, self.hc_eps)
        return ops.linear_fp32(ops.rms_norm(x, self.norm, self.norm_eps), vocabulary)

    def bindings(self) -> list[Binding]:
        return [
            *(Binding((f"{self.prefix}hc_head_{part}",), getattr(self, part)) for part in ("fn", "scale", "base")),
            Binding((self.norm_key,), self.norm),
        ]


class DraftBlock(nn.Module):
    """Multi-token prediction: from the trunk's streams at t and the token at t + 1, logits for t + 2.

    The block of a draft is a window block with a scored router; its state is the layer after the trunk's last.
    """

    def __init__(self, name: str, config: ModelConfig, storage: Storage, index_format: str):
        super().__init__()
        hidden = config.hidden_size
        self.name, self.eps = name, config.rms_norm_eps
        self.enorm = parameter(hidden, dtype=storage.dtype, device=storage.device)
        self.hnorm = parameter(hidden, dtype=storage.dtype, device=storage.device)
        self.e_proj = storage.linear(f"{name}.e_proj", hidden, hidden)
        self.h_proj = storage.linear(f"{name}.h_proj", hidden, hidden)
        self.block = Block(name, config, "window", 0, False, storage, index_format)
        self.head = Head(f"{name}.", f"{name}.norm.weight", config, storage)

    def inputs(self, trunk: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """trunk [B, S, n, d], embedded next tokens [B, S, d] -> Wep e [B, S, d] and Whp h_k [B, S, n, d]: the block
        reads their sum in every stream."""
        e = self.e_proj(*quantise(ops.rms_norm(embedded, self.enorm, self.eps), self.e_proj.activation))
        h = self.h_proj(*quantise(ops.rms_norm(trunk, self.hnorm, self.eps), self.h_proj.activation))
        return e, h

    def bindings(self) -> list[Binding]:
        return [
            Binding((f"{self.name}.enorm.weight",), self.enorm),
            Binding((f"{self.name}.hnorm.weight",), self.hnorm),
            *self.e_proj.bindings(),
            *self.h_proj.bindings(),
            *self.block.bindings(),
            *self.head.bindings(),
        ]


class DeepseekV4(nn.Module):
    """The model and the state of its sequences.

    `forward` runs any rows of any sequences; `prefill` a chunk of prompts; `decode_step` one token of every active
    sequence, sampling included, without reading anything back to the host.
    """

    def __init__(self, config: ModelConfig, storage: Storage, cache: CacheFormat, sizes: StateSizes):
        super().__init__()
        self.config, self.storage, self.cache = config, storage, cache
        self.embed = parameter(config.vocab_size, config.hidden_size, dtype=storage.dtype, device=storage.device)
        self.vocabulary = parameter(
            config.vocab_size, config.hidden_size, dtype=storage.fp32_operand_dtype, device=storage.device
        )
        layers = zip(config.layer_kinds, config.compress_ratios, config.hash_layers, strict=True)
        self.blocks = nn.ModuleList(
            Block(f"layers.{index}", config, kind, ratio, hashed, storage, cache.index)
            for index, (kind, ratio, hashed) in enumerate(layers)
        )
        self.drafts = nn.ModuleList(
            DraftBlock(f"mtp.{index}", config, storage, cache.index) for index in range(config.num_nextn_predict_layers)
        )
        self.head = Head("", "norm.weight", config, storage)
        # Expert ids of every token in the hash layers, [hash layers, vocab, k]; indexed by token, not by layer state.
        self.hash_experts = nn.Parameter(
            torch.zeros(
                sum(config.hash_layers), config.vocab_size, config.num_experts_per_tok,
                dtype=torch.int32, device=storage.device,
            ),
            requires_grad=False,
        )  # fmt: skip
        self.compiled = False
        self.allocate(sizes)

    def allocate(self, sizes: StateSizes) -> None:
        """Make a fresh state of other capacities. Graphs captured on the old one keep the old addresses."""
        config, device = self.config, self.storage.device
        self.state = DecodeState(config, sizes, self.cache, device)
        plain = rope_table(config.qk_rope_head_dim, sizes.max_seq_len, config.rope_theta)
        compressed = rope_table(
            config.qk_rope_head_dim, sizes.max_seq_len, config.compress_rope_theta,
            yarn_factor=config.yarn_factor, original_positions=config.yarn_original_positions,
            beta_fast=config.yarn_beta_fast, beta_slow=config.yarn_beta_slow,
        )  # fmt: skip
        self.register_buffer("window_rope", plain.to(device), persistent=False)
        self.register_buffer("compressed_rope", compressed.to(device), persistent=False)
        rows = sizes.max_batch * sizes.max_chunk
        free = torch.full((rows, config.num_experts_per_tok), -1, dtype=torch.int32, device=device)
        self.register_buffer("free_slots", free, persistent=False)  # the router chooses
        ones = torch.ones(rows, dtype=torch.float32, device=device)
        eye = torch.eye(config.hc_mult, dtype=torch.float32, device=device)
        self.register_buffer("enter_post", ones[:, None].repeat(1, config.hc_mult), persistent=False)
        self.register_buffer("enter_comb", eye.repeat(rows, 1, 1), persistent=False)
        for block in (*self.blocks, *(draft.block for draft in self.drafts)):
            block.ffn.shared.ones = ones

    @torch.no_grad()
    def forward(self, tokens: Tensor, positions: Tensor, state: DecodeState | None = None) -> Tensor:
        """tokens [B, S] int64, positions [B, S] int32 (-1: no token; a sequence's rows are consecutive) -> streams
        [B, S, n, d] after the last block. Writes the caches. B is the batch of the state (default: the model's whole
        state), S at most its chunk."""
        known = tokens.clamp_min(0)
        x = self.embed[known]
        flow = self.enter(x, x.new_zeros(*tokens.shape, self.config.hc_mult, x.shape[-1]))
        tables = iter(self.hash_experts)
        layers = (self.state if state is None else state).layers
        for block, layer in zip(self.blocks, layers, strict=False):
            fixed = next(tables)[known] if block.ffn.hashed else self.free(tokens)
            table = self.window_rope if block.attn.kind == "window" else self.compressed_rope
            self._mark_rows_dynamic(*flow, positions, fixed)
            flow = block(flow, positions, fixed, table, layer)
        return flow.mixed()

    def enter(self, x: Tensor, streams: Tensor) -> Flow:
        """The flow into a first block that reads x [B, S, d] + streams [B, S, n, d]."""
        rows = slice(x.shape[0] * x.shape[1])
        post, comb = self.enter_post[rows], self.enter_comb[rows]
        return Flow(x, streams, *(part.view(*x.shape[:2], *part.shape[1:]) for part in (post, comb)))

    def free(self, tokens: Tensor) -> Tensor:
        """fixed_ids of tokens [B, S] for which the router chooses all experts."""
        return self.free_slots[: tokens.numel()].view(*tokens.shape, -1)

    def logits(self, streams: Tensor) -> Tensor:
        """streams [B, S, n, d] -> [B, S, vocab] fp32."""
        return self.head(streams, self.vocabulary)

    @torch.no_grad()
    def draft_logits(self, streams: Tensor, next_tokens: Tensor, positions: Tensor, draft: int = 0) -> Tensor:
        """Trunk streams at `positions` and the tokens that follow them -> logits of the tokens after those."""
        module = self.drafts[draft]
        layer = self.state.layers[len(self.blocks) + draft]
        flow = self.enter(*module.inputs(streams, self.embed[next_tokens.clamp_min(0)]))
        flow = module.block(flow, positions, self.free(positions), self.window_rope, layer)
        return module.head(flow.mixed(), self.vocabulary)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Read `lengths[b]` tokens of each row of tokens [B, S] from the sequence's position on.

        Returns the logits [B, vocab] of each sequence's last token in this chunk (of row 0 where the length is 0). What
        lies beyond the state's capacity is not read; who keeps positions on the host checks there.
        """
        row = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device)
        position = self.state.position[:, None] + row
        valid = (row < lengths[:, None]) & (position < self.state.sizes.max_seq_len)
        positions = torch.where(valid, position, -1)
        streams = self.forward(tokens, positions)
        last = (lengths.long() - 1).clamp_min(0)[:, None, None, None].expand(-1, 1, *streams.shape[2:])
        self.state.position.add_(valid.sum(1, dtype=torch.int32))
        return self.logits(streams.gather(1, last))[:, 0]

    @torch.no_grad()
    def decode_step(self, rows: int | None = None) -> Tensor:
        """One token for every active sequence: read state.token at state.position, sample, write both back.

        rows: only the first so many sequences take part (default: all). Returns the sampled tokens [rows] int64, -1
        where the sequence was not active.
        """
        state = self.state if rows is None else self.state.first(rows)
        active = state.active & (state.position < state.sizes.max_seq_len)
        positions = torch.where(active, state.position, -1)[:, None]
        logits = self.logits(self.forward(state.token[:, None], positions, state))[:, 0]
        state.position.add_(active.to(torch.int32))
        return self.sample_next(logits, active, state)

    def sample_next(self, logits: Tensor, active: Tensor, state: DecodeState | None = None) -> Tensor:
        """Sample the token at state.position from logits [B, vocab] for the active rows; `eos` makes a row inactive."""
        state = self.state if state is None else state
        counter = state.position.long()
        sampled = ops.sample(logits, state.temperature, state.top_k, state.top_p, state.seed, counter)
        emitted = torch.where(active, sampled, -1)
        state.token.copy_(torch.where(active, sampled, state.token))
        state.output.index_copy_(0, state.step % state.output.shape[0], emitted[None])
        state.step.add_(1)
        state.active.copy_(active & (sampled[:, None] != state.eos).all(-1))
        return emitted

    def compile(self, backend: str | Callable | None = None, **options) -> None:
        """Compile block by block: a graph for each kind of block in decode and one in prefill, however many layers."""
        from dsv4_ops.backend import dsv4  # Inductor: seconds of import that eager use need not wait for

        limit = 4 * len(set(self.config.layer_kinds))
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
        for block in (*self.blocks, *(draft.block for draft in self.drafts)):
            block.compile(backend=backend or dsv4, fullgraph=True, dynamic=False, **options)
        self.compiled = True

    def _mark_rows_dynamic(self, *tensors: Tensor) -> None:
        """Prefill chunks of any size share a graph; decode (one row) is a graph of its own."""
        if self.compiled and not torch.compiler.is_compiling() and tensors[0].shape[1] > 1:
            for tensor in tensors:
                torch._dynamo.mark_dynamic(tensor, 1)

    def bindings(self) -> list[Binding]:
        tables = (block.ffn.name for block in self.blocks if block.ffn.hashed)
        return [
            Binding(("embed.weight",), self.embed),
            Binding(("head.weight",), self.vocabulary),
            *self.head.bindings(),
            *(binding for block in self.blocks for binding in block.bindings()),
            *(Binding((f"{name}.gate.tid2eid",), self.hash_experts[index]) for index, name in enumerate(tables)),
            *(binding for draft in self.drafts for binding in draft.bindings()),
        ]
