"""Everything that changes from step to step, in registered buffers with fixed addresses.

A `DecodeState` is made once for a batch and a length. CUDA graphs capture its addresses; prompts, positions and
sampling settings are written into it in place. No buffer needs clearing between sequences: what an op may read of a
sequence follows from the position alone.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dsv4_ops.ops.pages import index_page_bytes, kv_page_bytes
from model.config import ModelConfig

WINDOW_PAGE_SIZE = 64
COMPRESSED_PAGE_TOKENS = 256  # tokens behind one page of compressed entries: 64 entries at ratio 4, 2 at ratio 128
OUTPUT_RING_STEPS = 64


@dataclass(frozen=True)
class CacheFormat:
    """How pools are stored: packed FP8 KV with FP4 or FP8 index keys, or plain fp32."""

    packed: bool = True
    index_fp8: bool = False

    @property
    def index(self) -> str:
        return ("fp8" if self.index_fp8 else "fp4") if self.packed else "plain"


def compressed_page_size(ratio: int) -> int:
    return max(1, COMPRESSED_PAGE_TOKENS // ratio)


def block_table(batch: int, pages: int, device: torch.device) -> Tensor:
    """Each sequence owns `pages` consecutive pages. Any other assignment may be written into the buffer."""
    return torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)


class LayerState(nn.Module):
    """Pools and compressor states of one layer; the kind of the layer decides which there are."""

    def __init__(self, config: ModelConfig, ratio: int, kind: str, sizes: "StateSizes", cache: CacheFormat, device):
        super().__init__()
        dim, rope = config.head_dim, config.qk_rope_head_dim
        batch = sizes.max_batch

        def pool(pages: int, page_size: int) -> Tensor:
            if cache.packed:
                return torch.zeros(batch * pages, kv_page_bytes(page_size, dim, rope), dtype=torch.uint8, device=device)
            return torch.zeros(batch * pages, page_size * dim, dtype=torch.float32, device=device)

        def add(name: str, tensor: Tensor) -> None:
            self.register_buffer(name, tensor, persistent=False)

        add("window_table", block_table(batch, sizes.window_pages, device))
        add("window_pool", pool(sizes.window_pages, WINDOW_PAGE_SIZE))
        if kind == "window":
            return
        page_size = compressed_page_size(ratio)
        pages = -(-sizes.max_seq_len // (ratio * page_size))
        slots, width = (2 * ratio, 2) if kind == "csa" else (ratio, 1)
        add("compressed_table", block_table(batch, pages, device))
        add("compressed_pool", pool(pages, page_size))
        add("compressor_state", torch.zeros(batch, slots, 2, width * dim, dtype=torch.float32, device=device))
        if kind == "csa":
            index_dim = config.index_head_dim
            if cache.packed:
                size = index_page_bytes(page_size, index_dim, fp8=cache.index_fp8)
                add("index_pool", torch.zeros(batch * pages, size, dtype=torch.uint8, device=device))
            else:
                add("index_pool", torch.zeros(batch * pages, page_size * index_dim, dtype=torch.float32, device=device))
            add("index_state", torch.zeros(batch, slots, 2, 2 * index_dim, dtype=torch.float32, device=device))

    def first(self, rows: int) -> "LayerState":
        """The state of the first `rows` sequences: views of the same memory; the pools are shared by all."""
        view = LayerState.__new__(LayerState)
        nn.Module.__init__(view)
        for name, buffer in self.named_buffers():
            view.register_buffer(name, buffer if name.endswith("_pool") else buffer[:rows], persistent=False)
        return view


@dataclass(frozen=True)
class StateSizes:
    """Capacities: sequences, positions a sequence, and rows of a sequence in one call."""

    max_batch: int
    max_seq_len: int
    max_chunk: int
    window: int

    @property
    def window_pages(self) -> int:
        """The ring holds the window of the first row of a chunk and the whole chunk."""
        return -(-(self.window + self.max_chunk - 1) // WINDOW_PAGE_SIZE)


class DecodeState(nn.Module):
    """State of up to `max_batch` sequences of up to `max_seq_len` tokens.

    token [B] int64         last token of each sequence, the next one to be read
    position [B] int32      its position
    active [B] bool         rows that are decoded; the others write nothing
    output [R, B] int64     ring of sampled tokens (-1 where a row was not active); step [1] int64 counts its rows
    temperature, top_p [B] f32, top_k [B] int32, seed [B] int64    sampling settings of each row
    eos [E] int64           tokens that deactivate a row
    """

    def __init__(self, config: ModelConfig, sizes: StateSizes, cache: CacheFormat, device: torch.device):
        super().__init__()
        self.sizes = sizes
        batch = sizes.max_batch
        kinds = zip(config.compress_ratios, config.layer_kinds, strict=True)
        draft = [(0, "window")] * config.num_nextn_predict_layers
        self.layers = nn.ModuleList(
            LayerState(config, ratio, kind, sizes, cache, device) for ratio, kind in [*kinds, *draft]
        )
        buffers = {
            "token": torch.zeros(batch, dtype=torch.int64),
            "position": torch.zeros(batch, dtype=torch.int32),
            "active": torch.zeros(batch, dtype=torch.bool),
            "output": torch.full((OUTPUT_RING_STEPS, batch), -1, dtype=torch.int64),
            "step": torch.zeros(1, dtype=torch.int64),
            "temperature": torch.zeros(batch, dtype=torch.float32),
            "top_k": torch.zeros(batch, dtype=torch.int32),
            "top_p": torch.ones(batch, dtype=torch.float32),
            "seed": torch.arange(batch, dtype=torch.int64),
            "eos": torch.tensor(config.eos_token_ids, dtype=torch.int64),
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor.to(device), persistent=False)
        self._views: dict[int, DecodeState] = {}

    def first(self, rows: int) -> "DecodeState":
        """The state of the first `rows` sequences: views of the same memory, made once."""
        if rows == self.sizes.max_batch:
            return self
        if rows not in self._views:
            view = DecodeState.__new__(DecodeState)
            nn.Module.__init__(view)
            view.sizes = replace(self.sizes, max_batch=rows)
            view.layers = nn.ModuleList(layer.first(rows) for layer in self.layers)
            for name, buffer in self.named_buffers(recurse=False):
                shared = name in ("step", "eos")
                part = buffer if shared else buffer[:, :rows] if name == "output" else buffer[:rows]
                view.register_buffer(name, part, persistent=False)
            self._views[rows] = view
        return self._views[rows]

    def small_buffers(self) -> list[Tensor]:
        """Everything but the layers' pools and compressor states: what a step changes even if no row is active."""
        return [buffer for _, buffer in self.named_buffers(recurse=False)]

    def reset(self) -> None:
        """Forget all sequences. Pools keep their bytes: nothing reads an entry before its sequence has written it."""
        self.position.zero_()
        self.active.fill_(False)
        self.output.fill_(-1)
        self.step.zero_()
