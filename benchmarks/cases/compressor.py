"""Compressors. In a decode step a sequence may end a group, and then writes an entry, or only keep its token.

A prefill chunk ends a group in every `ratio` rows and reads of the state only what came before its first row.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.case import Case
from benchmarks.cases.norm import EPS, table_bytes
from benchmarks.floors import Traffic
from benchmarks.inputs import Inputs
from benchmarks.peers import Chain, kernel
from benchmarks.shapes import Widths, batch_and_rows
from dsv4_ops.ops.pages import index_page_bytes, kv_entry_bytes

COMPRESSED_PAGE_TOKENS = 256


@dataclass(frozen=True)
class Compressor:
    """One of the ops; `halves` is 2 where a group is pooled with the one before it."""

    op: str
    halves: int
    ratio: int
    dim: int
    rope_dim: int
    entry_bytes: int  # what an entry takes in its pool

    @property
    def token_bytes(self) -> int:
        """kv and score of one token in one of the halves, fp32."""
        return 2 * 4 * self.dim

    @property
    def page_size(self) -> int:
        return max(1, COMPRESSED_PAGE_TOKENS // self.ratio)

    def traffic(self, batch: int, rows: int, ends: bool) -> Traffic:
        """Of chunks that begin with a group and, if `ends`, end with one; or of single rows."""
        groups, slots = -(-rows // self.ratio) if ends else 0, self.halves * self.ratio
        kept = self.ratio * (self.halves - 1)  # tokens of the group before the first
        if rows == 1:
            kept += self.ratio - 1
        token, parameters = self.halves * self.token_bytes, 2 * self.dim if ends else 0
        read = rows * (token + 4) + groups * (4 * self.rope_dim) + (kept * self.token_bytes if ends else 0)
        read = batch * read + table_bytes(batch, groups, self.page_size)
        places = min(rows, self.ratio)  # of the biases `ape`, which all sequences share
        written = min(rows, slots) * token + groups * self.entry_bytes
        return Traffic(read + places * token // 2 + parameters, batch * written)

    def make(self, i: Inputs, w: Widths, batch: int, rows: int, ends: bool) -> tuple:
        f32, width = torch.float32, self.halves * self.dim
        table = i.block_table(batch, w.context // self.ratio, self.page_size)
        state = i.normal(batch, self.halves * self.ratio, 2, width, dtype=f32)
        kv, score = i.normal(batch, rows, width, dtype=f32), i.normal(batch, rows, width, dtype=f32)
        ape, rope = i.normal(self.ratio, width, dtype=f32), i.rope_table(self.rope_dim, w.context)
        parameters = ape, i.norm_weight(self.dim), rope
        last = w.context - 1 if ends else w.context - 2
        positions = i.positions(batch, rows, last, apart=w.hca_ratio)
        return state, self.pool(i, table), kv, score, *parameters, table, positions, EPS, self.ratio, self.page_size

    def pool(self, i: Inputs, table: torch.Tensor) -> torch.Tensor:
        form = self.op.rpartition("_")[2]
        if form == "append":
            return i.kv_pool(table, self.page_size, self.dim, self.rope_dim)
        if form == "plain":
            return i.normal(table.numel(), self.page_size * self.dim, dtype=torch.float32)
        return i.index_pool(table, self.page_size, self.dim, fp8=form == "fp8")


def compressors(w: Widths) -> Iterator[Compressor]:
    entry = sum(kv_entry_bytes(w.head_dim, w.rope_dim))
    yield Compressor("csa_compress_append", 2, w.csa_ratio, w.head_dim, w.rope_dim, entry)
    yield Compressor("hca_compress_append", 1, w.hca_ratio, w.head_dim, w.rope_dim, entry)
    dim = w.index_head_dim
    sizes = {"plain": 4 * dim, "fp8": index_page_bytes(1, dim, fp8=True), "fp4": index_page_bytes(1, dim, fp8=False)}
    for form, size in sizes.items():
        yield Compressor(f"index_compress_append_{form}", 2, w.csa_ratio, dim, w.rope_dim, size)


def peers(c: Compressor, batch: int) -> tuple[Chain, ...]:
    """Chains of a decode step that ends groups: compression first, then what makes an entry of it.

    The one for index keys leaves out norm, rope and Hadamard transform.
    """
    last = {
        "csa_compress_append": kernel("sgl_fused_k_norm_rope_flashmla", m=batch),
        "index_compress_append_fp8": kernel("vllm_indexer_k_quant_cache", m=batch),
    }
    return ((kernel("sgl_c4_compress_decode", b=batch, hd=c.dim), last[c.op]),) if c.op in last else ()


def cases(w: Widths, tokens: int) -> Iterator[Case]:
    batch, rows = batch_and_rows(tokens)
    for c in compressors(w):
        for what, ends in (("a group ends", True), ("no group ends", False)) if rows == 1 else (("chunk", True),):
            yield Case(
                c.op, tokens, f"D {c.dim}, {what}", c.traffic(batch, rows, ends),
                lambda i, c=c, ends=ends: c.make(i, w, batch, rows, ends),
                peers(c, batch) if ends and rows == 1 else (),
            )  # fmt: skip
