"""Token streams for the tests of the compressors on a GPU, fed in any chunks, and the judge of their pools.

A `Stream` holds the projections of a batch of sequences and starts each of them at any position, with the state that
the tokens before it have left. What an op must not read is NaN, what it must not write is poison.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsv4_ops.ops import compressor, pages  # noqa: F401  registers the ops
from dsv4_ops.ops.rope import rope_table
from graph_tests.checks import POISON, relative_error

EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """One compressor: kind csa | hca | index, form kv | plain | fp8 | fp4."""

    kind: str
    form: str
    dim: int
    rope_dim: int
    ratio: int
    page_size: int = 64

    @property
    def op(self) -> str:
        return f"index_compress_append_{self.form}" if self.kind == "index" else f"{self.kind}_compress_append"

    @property
    def halves(self) -> int:
        return 1 if self.kind == "hca" else 2

    @property
    def page_elements(self) -> int:
        if self.form == "plain":
            return self.page_size * self.dim
        if self.form == "kv":
            return self.page_size * sum(pages.kv_entry_bytes(self.dim, self.rope_dim))
        return pages.index_page_bytes(self.page_size, self.dim, fp8=self.form == "fp8")

    def read(self, pool: Tensor, block_table: Tensor, entries: Tensor) -> Tensor:
        """Entries [B, N], dequantised."""
        if self.form == "plain":
            return pages.gather_entries(pool, block_table, entries, self.page_size, 0, self.dim)
        if self.form == "kv":
            return pages.read_kv(pool, block_table, entries, self.page_size, self.dim, self.rope_dim)
        read = pages.read_index_keys_fp8 if self.form == "fp8" else pages.read_index_keys_fp4
        return read(pool, block_table, entries, self.page_size, self.dim)


# The released models, and small ones with other ratios and page sizes: 96 channels fill no whole number of warps.
CSA = Shape("csa", "kv", 512, 64, 4)
HCA = Shape("hca", "kv", 512, 64, 128, 2)
INDEX_FP8, INDEX_FP4 = (Shape("index", form, 128, 64, 4) for form in ("fp8", "fp4"))
SMALL = (
    Shape("csa", "kv", 96, 32, 2, 2),
    Shape("csa", "plain", 20, 6, 8, 2),
    Shape("hca", "kv", 128, 64, 8, 2),
    Shape("hca", "plain", 96, 32, 16, 2),
    Shape("index", "plain", 64, 32, 4, 2),
    Shape("index", "fp8", 32, 32, 4, 2),
    Shape("index", "fp4", 64, 32, 16, 2),
)
ALL = (CSA, replace(CSA, form="plain"), HCA, replace(HCA, form="plain"), INDEX_FP8, INDEX_FP4, *SMALL)


def name(shape: Shape) -> str:
    return f"{shape.kind}-{shape.form}-{shape.dim}-{shape.ratio}"


class Stream:
    """`length` tokens of `batch` sequences.

    `exact`: integers whose pooled entries and norms have no rounding, since the scores of a group differ by nothing but
    `ape`, which they take back: the weights are one over a power of two.
    """

    def __init__(self, shape: Shape, batch: int, length: int, *, exact: bool = False, seed: int = 0):
        self.shape, self.batch, self.length = shape, batch, length
        generator = torch.Generator().manual_seed(seed)
        width = shape.halves * shape.dim

        def random(*sizes: int) -> Tensor:
            values = torch.randn(*sizes, generator=generator)
            return values.mul(3).round().clamp(-8, 8) if exact else values

        self.kv, self.ape = random(batch, length, width), random(shape.ratio, width)
        self.score = random(batch, length, width) * 2
        if exact:
            common = random(batch, 1, shape.dim).repeat(1, 1, shape.halves)
            self.score = common - self.ape[torch.arange(length) % shape.ratio]
        self.norm_weight = torch.randn(shape.dim, generator=generator)
        if seed % 2:
            self.norm_weight = self.norm_weight.bfloat16()
        self.rope = rope_table(shape.rope_dim, length + 1, 1.6e5)
        max_pages = length // (shape.ratio * shape.page_size) + 1
        order = torch.randperm(batch * max_pages + 1, generator=generator)  # one page belongs to nobody
        self.block_table = order[: batch * max_pages].view(batch, max_pages).int()

    def pool(self) -> Tensor:
        """Poison; pages lie a little apart."""
        rows = self.batch * self.block_table.shape[1] + 1
        if self.shape.form == "plain":
            return torch.full((rows, self.shape.page_elements + 4), math.nan)
        return torch.full((rows, self.shape.page_elements + 16), POISON, dtype=torch.uint8)

    def state(self, starts: list[int]) -> Tensor:
        """What the tokens before `starts` left, slot by slot; NaN where there was none."""
        slots = self.shape.halves * self.shape.ratio
        state = torch.full((self.batch, slots, 2, self.kv.shape[2]), math.nan)
        for b, start in enumerate(starts):
            for position in range(max(0, start - slots), start):
                state[b, position % slots, 0] = self.kv[b, position]
                state[b, position % slots, 1] = self.score[b, position] + self.ape[position % self.shape.ratio]
        return state

    def chunk(self, starts: list[int], counts: list[int], rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """kv, score [B, rows, width] and positions [B, rows]: counts[b] tokens from starts[b] on, then NaN at -1."""
        kv, score = (torch.full((self.batch, rows, self.kv.shape[2]), math.nan) for _ in range(2))
        positions = torch.full((self.batch, rows), -1, dtype=torch.int32)
        for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
            kv[b, :count], score[b, :count] = self.kv[b, start : start + count], self.score[b, start : start + count]
            positions[b, :count] = torch.arange(start, start + count)
        return kv, score, positions

    def arguments(self, state: Tensor, pool: Tensor, chunk: tuple[Tensor, Tensor, Tensor]) -> tuple:
        kv, score, positions = chunk
        shape = self.shape
        return (
            state, pool, kv, score, self.ape, self.norm_weight, self.rope, self.block_table, positions, EPS,
            shape.ratio, shape.page_size,
        )  # fmt: skip

    def call(self, starts: list[int], counts: list[int], rows: int | None = None) -> tuple:
        """Arguments of one call in the middle of the sequences."""
        rows = max(counts, default=0) if rows is None else rows
        return self.arguments(self.state(starts), self.pool(), self.chunk(starts, counts, rows))

    def groups(self, starts: list[int], counts: list[int]) -> Tensor:
        """Groups that end in these chunks [B, N], -1 padded."""
        ratio = self.shape.ratio
        lists = [range(a // ratio, (a + n) // ratio) for a, n in zip(starts, counts, strict=True)]
        most = max(map(len, lists), default=0)
        return torch.tensor([[*groups, *[-1] * (most - len(groups))] for groups in lists]).view(self.batch, most)

    def pool_judge(self, starts: list[int], counts: list[int]):
        """Compares two pools of random data after a call from poison.

        A weight of the softmax has an error of a few 2^-23. In fp32 that stays; a value that is rounded to bf16 falls
        on the other side once in thousands, and moves by 2^-8 of itself, or in a quantised pool to a neighbouring code.
        """
        shape, table = self.shape, self.block_table
        groups = self.groups(starts, counts)
        limit = {"plain": 2e-6, "kv": 0.02, "fp8": 0.02, "fp4": 0.1}[shape.form]

        def judge(actual: Tensor, expected: Tensor) -> None:
            pool = self.pool()
            actual, expected = actual.view(pool.shape), expected.view(pool.shape)
            different = (actual.view(torch.uint8) != expected.view(torch.uint8)).double().mean()
            assert shape.form == "plain" or different < 0.01, f"{different:.2%} of the bytes differ"
            if groups.numel():
                found, wanted = (shape.read(tensor, table, groups)[groups >= 0] for tensor in (actual, expected))
                for group, (one, other) in enumerate(zip(found, wanted, strict=True)):
                    error = relative_error(one, other)
                    assert error < limit, f"written group {group}: relative error {error:.1e}"
            if shape.form == "plain":
                assert torch.equal(actual.isnan(), expected.isnan()), "wrote elsewhere"

        return judge
