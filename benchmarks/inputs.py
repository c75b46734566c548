"""Random arguments of operators on any device: activations, weights in every format, block tables and filled pools."""

from functools import cache

import torch
from torch import Tensor

from dsv4_ops.ops.nvfp4 import nvfp4_row_scale_reference, quant_nvfp4_reference
from dsv4_ops.ops.pages import INDEX_GROUP, index_page_bytes, kv_entry_bytes, kv_page_bytes
from dsv4_ops.ops.quant import quant_fp8_reference, quant_mxfp4_reference
from dsv4_ops.ops.rope import rope_table

THETA = 10000.0
FP8_GROUP = 128
E4M3_SIGN = 0x80
UE8M0_ONE = 127
E2M1_SPREAD = 3  # standard deviation of codes that are all equally likely


@cache
def cached_rope_table(rope_dim: int, positions: int) -> Tensor:
    return rope_table(rope_dim, positions, THETA)


class Inputs:
    """Makes tensors on one device, the same ones for the same seed."""

    def __init__(self, device: str | torch.device, seed: int = 0):
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return x.mul_(scale).to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        """fp32 in [0, 1)."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        """low .. high - 1."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=dtype)

    def norm_weight(self, width: int) -> Tensor:
        return 1 + self.normal(width, scale=0.1)

    # ---- quantised operands, each a tuple: codes, then scales ----

    def fp8(self, *shape: int, group: int = FP8_GROUP) -> tuple[Tensor, Tensor]:
        return quant_fp8_reference(self.normal(*shape), group)

    def mxfp4(self, *shape: int) -> tuple[Tensor, Tensor]:
        return quant_mxfp4_reference(self.normal(*shape))

    def nvfp4(self, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
        x = self.normal(*shape)
        row_scale = nvfp4_row_scale_reference(x)
        return *quant_nvfp4_reference(x, row_scale), row_scale

    def fp8_codes(self, *shape: int) -> Tensor:
        """E4M3 codes of numbers near 1, either sign, none NaN; uint8."""
        magnitude = self.integers(0x20, 0x48, *shape, dtype=torch.uint8)
        return magnitude + E4M3_SIGN * self.integers(0, 2, *shape, dtype=torch.uint8)

    def fp8_weight(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Weights [..., N, K] and a scale for each 128 x 128 block."""
        *stack, rows, columns = shape
        blocks = (*stack, -(-rows // FP8_GROUP), -(-columns // FP8_GROUP))
        return self.fp8_codes(*shape).view(torch.float8_e4m3fn), self.exponents(columns, 1, *blocks)

    def mxfp4_weight(self, *shape: int) -> tuple[Tensor, Tensor]:
        *rows, columns = shape
        codes = self.integers(0, 256, *rows, columns // 2, dtype=torch.uint8)
        return codes, self.exponents(columns, E2M1_SPREAD, *rows, columns // 32)

    def nvfp4_weight(self, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
        """Global scales have the shape of the stack, [1] without one."""
        *rows, columns = shape
        codes = self.integers(0, 256, *rows, columns // 2, dtype=torch.uint8)
        scale = self.integers(0x30, 0x48, *rows, columns // 16, dtype=torch.uint8).view(torch.float8_e4m3fn)
        factor = torch.full(tuple(rows[:-1]) or (1,), columns**-0.5 / E2M1_SPREAD, device=self.device)
        return codes, scale, factor

    def exponents(self, columns: int, spread: int, *shape: int) -> Tensor:
        """UE8M0 scales that make a product over `columns` codes of this spread keep the size of its input."""
        middle = UE8M0_ONE - (columns * spread**2).bit_length() // 2
        return self.integers(middle - 1, middle + 2, *shape, dtype=torch.uint8)

    # ---- positions and paged pools ----

    def positions(self, batch: int, rows: int, last: int, apart: int = 0) -> Tensor:
        """int32 [B, S]: consecutive rows that end at `last`, every sequence `apart` positions before the one above."""
        end = last - apart * torch.arange(batch, device=self.device)[:, None]
        return (end - torch.arange(rows - 1, -1, -1, device=self.device)).to(torch.int32)

    def rope_table(self, rope_dim: int, positions: int) -> Tensor:
        return cached_rope_table(rope_dim, positions).to(self.device)

    def block_table(self, batch: int, entries: int, page_size: int) -> Tensor:
        """Pages of `entries` entries of each sequence, in random order."""
        pages = -(-entries // page_size)
        order = torch.randperm(batch * pages, generator=self.generator, device=self.device)
        return order.to(torch.int32).view(batch, pages)

    def kv_pool(self, table: Tensor, page_size: int, head_dim: int, rope_dim: int) -> Tensor:
        """A packed KV pool of all pages of `table`, every entry valid."""
        size = kv_page_bytes(page_size, head_dim, rope_dim)
        pool = torch.zeros(table.numel(), size, dtype=torch.uint8, device=self.device)
        fill_kv_pool(self, pool, page_size, head_dim, rope_dim)
        return pool

    def index_pool(self, table: Tensor, page_size: int, dim: int, *, fp8: bool) -> Tensor:
        """A packed pool of index keys, every entry valid."""
        size = index_page_bytes(page_size, dim, fp8=fp8)
        pool = torch.empty(table.numel(), size, dtype=torch.uint8, device=self.device)
        fill_index_pool(self, pool, page_size, dim, fp8=fp8)
        return pool


def fill_kv_pool(inputs: Inputs, pool: Tensor, page_size: int, head_dim: int, rope_dim: int) -> None:
    """Overwrite all entries of a packed KV pool with random ones."""
    pages, nope = pool.shape[0], head_dim - rope_dim
    data_bytes, scale_bytes = kv_entry_bytes(head_dim, rope_dim)
    data = pool[:, : page_size * data_bytes].unflatten(1, (page_size, data_bytes))
    data[..., :nope] = inputs.fp8_codes(pages, page_size, nope)
    data[..., nope:] = inputs.normal(pages, page_size, rope_dim).view(torch.uint8)
    scales = pool[:, page_size * data_bytes : page_size * (data_bytes + scale_bytes)]
    scales.copy_(inputs.integers(UE8M0_ONE - 2, UE8M0_ONE + 1, *scales.shape, dtype=torch.uint8))


def fill_index_pool(inputs: Inputs, pool: Tensor, page_size: int, dim: int, *, fp8: bool) -> None:
    """Overwrite all entries of a packed pool of index keys with random ones."""
    pages = pool.shape[0]
    if fp8:
        pool[:, : page_size * dim] = inputs.fp8_codes(pages, page_size * dim)
        scale = inputs.uniform(pages, page_size) + 0.5
        pool[:, page_size * dim :] = scale.view(torch.uint8)
        return
    data, scales = pool.split((page_size * dim // 2, page_size * dim // INDEX_GROUP), dim=1)
    data.copy_(inputs.integers(0, 256, *data.shape, dtype=torch.uint8))
    scales.copy_(inputs.integers(UE8M0_ONE - 2, UE8M0_ONE + 1, *scales.shape, dtype=torch.uint8))
