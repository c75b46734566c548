"""A KV pool for tests, written byte by byte from the page layout, with its keys on record."""

import math

import torch


class Pool:
    """A paged pool of NaNs with shuffled pages, filled entry by entry; `keys[b][entry]` is what was written (fp64)."""

    def __init__(self, batch: int, entries: int, page_size: int, dims: tuple, packed: bool, generator):
        self.page_size, self.dims, self.packed, self.generator = page_size, dims, packed, generator
        pages = -(-entries // page_size)
        order = torch.randperm(batch * pages + 1, generator=generator)[: batch * pages]  # one page belongs to nobody
        self.table = order.view(batch, pages).int()
        nope, rope = dims[0] - dims[1], dims[1]
        self.data, self.scales = nope + 2 * rope, 8 * math.ceil(nope / 512)
        stride = page_size * (self.data + self.scales) if packed else page_size * dims[0]
        shape = (batch * pages + 1, -(-stride // 32) * 32 + 32)  # kernels want pages at multiples of 16 bytes
        self.bytes = torch.full(shape, 0xFF, dtype=torch.uint8) if packed else torch.full(shape, math.nan)
        self.keys = [{} for _ in range(batch)]

    def fill(self, sequence: int, entry: int) -> None:
        page, slot = self.table[sequence, entry // self.page_size], entry % self.page_size
        head_dim, nope = self.dims[0], self.dims[0] - self.dims[1]
        if not self.packed:
            key = torch.randn(head_dim, generator=self.generator)
            self.bytes[page, slot * head_dim : (slot + 1) * head_dim] = key
        else:
            codes = torch.randn(nope, generator=self.generator).to(torch.float8_e4m3fn)
            rope = torch.randn(head_dim - nope, generator=self.generator).to(torch.bfloat16)
            exponents = torch.randint(-2, 2, (nope // 64,), generator=self.generator)
            at = slot * self.data
            self.bytes[page, at : at + nope] = codes.view(torch.uint8)
            self.bytes[page, at + nope : at + self.data] = rope.view(torch.uint8)
            at = self.page_size * self.data + slot * self.scales
            self.bytes[page, at : at + nope // 64] = (exponents + 127).to(torch.uint8)
            scale = (2.0 ** exponents.double()).repeat_interleave(64)
            key = torch.cat((codes.double() * scale, rope.double()))
        self.keys[sequence][entry] = key.double()
