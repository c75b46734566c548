"""Arguments of the attention ops over pools whose keys are on record.

Pools start out as NaN everywhere; only entries that some row may see are filled in, byte by byte from the page layout.
Positions lie under B = one sequence each, so that one call covers many of them.
"""

import torch

from graph_tests.ops.kv_pool import Pool

SMALL, FULL = (80, 16), (512, 64)  # (head dim, rope dim); a packed pool needs head dim - rope dim in multiples of 64
MAX_POSITION = 2048
F32 = torch.float32


def rope_table(rope_dim: int, positions: int = MAX_POSITION) -> torch.Tensor:
    angle = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(0, rope_dim, 2) / rope_dim)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).flatten(1).float()


def fill_window(pool: Pool, positions: list[list[int]], window: int) -> list:
    """Write every position that some row sees to entry position % ring; the keys of each row."""
    ring, keys = pool.table.shape[1] * pool.page_size, []
    for b, row in enumerate(positions):
        for position in range(max(row[0] - window + 1, 0), max(row) + 1):
            pool.fill(b, position % ring)
        keys.append([[pool.keys[b][p % ring] for p in range(max(at - window + 1, 0), at + 1)] for at in row])
    return keys


def fill_compressed(pool: Pool, positions: list[list[int]], ratio: int, k: int | None) -> tuple[list, torch.Tensor]:
    """Write the complete entries; the keys of each row: all that it sees, or up to k of them, named by the indices."""
    keys, indices = [[] for _ in positions], torch.full((len(positions), len(positions[0]), k or 0), -1).int()
    for b, row in enumerate(positions):
        for entry in range((max(row) + 1) // ratio):
            pool.fill(b, entry)
        for s, position in enumerate(row):
            visible = list(range((position + 1) // ratio))
            if k is not None:
                slots = torch.randperm(k, generator=pool.generator)[: len(visible)]
                visible = torch.randperm(len(visible), generator=pool.generator)[: len(slots)].tolist()
                indices[b, s, slots] = torch.tensor(visible, dtype=torch.int32)
            keys[b].append([pool.keys[b][entry] for entry in visible])
    return keys, indices


def make(
    kind: str,
    positions: list[list[int]],
    *,
    heads: int = 8,
    dims: tuple = SMALL,
    window: int = 16,
    ratio: int = 4,
    pages: tuple = (5, 3),
    packed: bool = True,
    dtype: torch.dtype = F32,
    k: int = 6,
    ring: int | None = None,
    sink: torch.Tensor | None = None,
):
    """Arguments of the op, and for every (sequence, row) the list of its keys in fp64."""
    generator = torch.Generator().manual_seed(0)
    batch, rows, longest = len(positions), len(positions[0]), max(map(max, positions)) + 1
    near = Pool(batch, ring or window + rows - 1, pages[0], dims, packed, generator)
    far = Pool(batch, max(longest // ratio, 1) + 2, pages[1], dims, packed, generator)
    near_keys = fill_window(near, positions, window)
    far_keys, indices = fill_compressed(far, positions, ratio, k if kind == "selected" else None)
    both = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(near_keys, far_keys, strict=True)]
    keys = near_keys if kind == "window" else both
    q = torch.randn(batch, rows, heads, dims[0], generator=generator).to(dtype)
    sink = torch.randn(heads, generator=generator) if sink is None else sink
    pools = (near.bytes,) if kind == "window" else (near.bytes, far.bytes)
    tables = (near.table,) if kind == "window" else (near.table, far.table)
    chosen = (indices,) if kind == "selected" else ()
    scalars = {"window": (window, pages[0]), "selected": (window, *pages), "compressed": (window, ratio, *pages)}[kind]
    at = torch.tensor(positions, dtype=torch.int32)
    table = rope_table(dims[1], max(longest, MAX_POSITION))
    return (q, *pools, sink, table, *tables, *chosen, at, *scalars), keys


def sequence_arguments(kind: str) -> tuple[int, ...]:
    """Places of the arguments with a row for each sequence."""
    return {"window": (0, 4, 5), "selected": (0, 5, 6, 7, 8), "compressed": (0, 5, 6, 7)}[kind]
