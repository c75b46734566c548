"""Arguments of index_scores_* and index_topk_* for tests on a GPU, and the arithmetic that its FP8 products have."""

import torch
from torch import Tensor

from dsv4_ops.ops import pages
from dsv4_ops.ops.formats import encode_e2m1, pack_e2m1
from dsv4_ops.ops.quant import dequant_mxfp4_reference, quant_mxfp4_reference

FORMS = ("plain", "fp8", "fp4")
RATIO = 4


def positions_of(batch: int, rows: int, capacity: int, generator: torch.Generator) -> Tensor:
    """One sequence is full, one has no token, the others end anywhere; consecutive rows, the first ones -1 if short."""
    last = torch.randint(-1, capacity * RATIO, (batch, 1), generator=generator)
    last[0] = capacity * RATIO - 1
    if batch > 2:
        last[1] = -1
    return (last - torch.arange(rows - 1, -1, -1)).clamp_min(-1).int()


def block_table_of(batch: int, max_pages: int, generator: torch.Generator) -> Tensor:
    """All pages but one in random order."""
    return torch.randperm(batch * max_pages + 1, generator=generator)[: batch * max_pages].view(batch, max_pages).int()


def _pool(form: str, table: Tensor, page_size: int, dim: int, padding: int) -> Tensor:
    """Poison everywhere, `padding` elements more than a page needs."""
    count = table.numel() + 1
    if form == "plain":
        return torch.full((count, page_size * dim + padding), torch.nan)
    page = pages.index_page_bytes(page_size, dim, fp8=form == "fp8")
    return torch.full((count, page + padding), 0xFF, dtype=torch.uint8)


def random_arguments(
    form: str, batch: int, rows: int, *, heads=64, dim=128, page_size=64, max_pages=4, padding=0, seed=0
) -> tuple:
    """Normal queries and keys of many magnitudes, quantised like the model's."""
    generator = torch.Generator().manual_seed(seed)
    table = block_table_of(batch, max_pages, generator)
    capacity = max_pages * page_size
    entries = torch.arange(capacity).expand(batch, capacity)
    keys = torch.randn(batch, capacity, dim, generator=generator)
    keys *= torch.randn(batch, capacity, 1, generator=generator).exp()
    q = torch.randn(batch, rows, heads, dim, generator=generator)
    pool = _pool(form, table, page_size, dim, padding)
    if form == "plain":
        pages.scatter_entries(pool, table, entries, page_size, 0, keys)
        query = (q,)
    elif form == "fp8":
        pages.write_index_keys_fp8(pool, table, entries, page_size, keys)
        query = (q.to(torch.float8_e4m3fn),)
    else:
        pages.write_index_keys_fp4(pool, table, entries, page_size, keys)
        query = quant_mxfp4_reference(q)
    w = torch.randn(batch, rows, heads, generator=generator)
    return *query, w, pool, table, positions_of(batch, rows, capacity, generator), RATIO, page_size


def exact_arguments(
    form: str, batch: int, rows: int, *, heads=64, dim=128, page_size=64, max_pages=4, padding=0, seed=0
) -> tuple:
    """Small integers times powers of two: no sum rounds or is truncated in any order, and many scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    table = block_table_of(batch, max_pages, generator)
    capacity = max_pages * page_size
    entries = torch.arange(capacity).expand(batch, capacity)

    def integers(*shape: int, most: int = 2) -> Tensor:
        return torch.randint(-most, most + 1, shape, generator=generator).float()

    keys, q = integers(batch, capacity, dim, most=1), integers(batch, rows, heads, dim)
    exponents = torch.randint(-1, 2, (batch, capacity, max(dim // 32, 1)), generator=generator)
    pool = _pool(form, table, page_size, dim, padding)
    if form == "plain":
        pages.scatter_entries(pool, table, entries, page_size, 0, keys)
        query = (q,)
    elif form == "fp8":
        codes = keys.to(torch.float8_e4m3fn).view(torch.uint8)
        scale = (2.0 ** exponents[..., :1]).contiguous().view(torch.uint8)
        pages.scatter_entries(pool, table, entries, page_size, 0, codes)
        pages.scatter_entries(pool, table, entries, page_size, page_size * dim, scale)
        query = (q.to(torch.float8_e4m3fn),)
    else:
        pages.scatter_entries(pool, table, entries, page_size, 0, pack_e2m1(encode_e2m1(keys)))
        pages.scatter_entries(pool, table, entries, page_size, page_size * dim // 2, (exponents + 127).to(torch.uint8))
        scale = torch.randint(126, 129, (batch, rows, heads, dim // 32), generator=generator).to(torch.uint8)
        query = (pack_e2m1(encode_e2m1(q)), scale)
    w = integers(batch, rows, heads)
    return *query, w, pool, table, positions_of(batch, rows, capacity, generator), RATIO, page_size


def dequantised(form: str, arguments: tuple) -> tuple[Tensor, Tensor]:
    """Queries [B, S, Hi, Di] and keys [B, C, Di] as fp64. Keys of FP8 include their scale."""
    query, (_, pool, table, _, _, page_size) = arguments[:-6], arguments[-6:]
    entries = torch.arange(table.shape[1] * page_size).expand(table.shape[0], -1)
    dim = query[0].shape[-1] * (2 if form == "fp4" else 1)
    if form == "plain":
        return query[0].double(), pages.gather_entries(pool, table, entries, page_size, 0, dim).double()
    if form == "fp8":
        data = pages.gather_entries(pool, table, entries, page_size, 0, dim).view(torch.float8_e4m3fn).double()
        scale = pages.gather_entries(pool, table, entries, page_size, page_size * dim, 4).view(torch.float32)
        return query[0].double(), data * scale.double()
    return dequant_mxfp4_reference(*query).double(), pages.read_index_keys_fp4(
        pool, table, entries, page_size, dim
    ).double()


# ---- FP8 products of Hopper's tensor cores ----

STEPS = 4


def order_of_steps() -> Tensor:
    """[4, 32]: the channels of a head that each step of the kernel's product takes."""
    step, thread, byte = torch.meshgrid(torch.arange(STEPS), torch.arange(4), torch.arange(8), indexing="ij")
    return (step // 2 * 64 + thread * 16 + step % 2 * 8 + byte).flatten(1)
