"""What the tests of the compressors share: random compressors judged by transformers, and poisoned caches to feed.

A `Case` is one compressor with random weights and a few sequences. Its projections are computed once, so that every way
of feeding them (prefill, chunks, one token at a time, ragged batches) sees the same rows.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4CSACache,
    DeepseekV4CSACompressor,
    DeepseekV4HCACache,
    DeepseekV4HCACompressor,
)

from dsv4_ops.ops import compressor  # noqa: F401  registers the ops
from dsv4_ops.ops.rope import rope_table
from graph_tests import checks

OPS = torch.ops.dsv4
HIDDEN, HEAD_DIM, ROPE_DIM, INDEX_DIM = 32, 96, 32, 64  # 96 = one group of 64 and the rope part
CSA_RATIO, HCA_RATIO = 4, 16
EPS, THETA, PAGE_SIZE, POISON = 1e-6, 1.6e5, 2, 0xA5
TOLERANCE = 2e-6  # fp32: the same softmax, sum and norm of at most 16 rows, summed in another order
KINDS = {"csa": (CSA_RATIO, 2, HEAD_DIM), "hca": (HCA_RATIO, 1, HEAD_DIM), "index": (CSA_RATIO, 2, INDEX_DIM)}


@dataclass
class Case:
    kind: str  # csa | hca | index
    kv: torch.Tensor  # [B, L, width] f32
    score: torch.Tensor
    ape: torch.Tensor
    norm_weight: torch.Tensor
    expected: torch.Tensor  # [B, L // ratio, D] f32, the entries of transformers

    @property
    def ratio(self):
        return KINDS[self.kind][0]

    @property
    def slots(self):
        return KINDS[self.kind][0] * KINDS[self.kind][1]

    @property
    def dim(self):
        return KINDS[self.kind][2]


def table(length):
    return rope_table(ROPE_DIM, length, THETA)


def config():
    return DeepseekV4Config(
        hidden_size=HIDDEN, head_dim=HEAD_DIM, qk_rope_head_dim=ROPE_DIM, q_lora_rank=16, num_hidden_layers=2,
        num_attention_heads=2, index_n_heads=2, index_head_dim=INDEX_DIM, index_topk=4, rms_norm_eps=EPS,
        compress_rope_theta=THETA, compress_rates={
            "compressed_sparse_attention": CSA_RATIO, "heavily_compressed_attention": HCA_RATIO
        },
    )  # fmt: skip


@torch.no_grad()
def make_case(kind, batch, length, seed=0):
    """Random weights, random hidden states, and what transformers computes from them in one prefill."""
    torch.manual_seed(seed)
    hca = kind == "hca"
    module, cache = (
        (DeepseekV4HCACompressor(config()), DeepseekV4HCACache(config()))
        if hca
        else (DeepseekV4CSACompressor(config()), DeepseekV4CSACache(config()))
    )
    for parameter in module.parameters():
        parameter.normal_(std=1.0 if parameter.dim() == 1 else 0.4)
    hidden, positions = torch.randn(batch, length, HIDDEN), torch.arange(length).expand(batch, -1)
    module(hidden, torch.randn(batch, length, 16), positions, SimpleNamespace(layers=[cache]), 0)
    part = module.indexer if kind == "index" else module
    expected = cache.compressed_kv["indexer" if kind == "index" else "compressor"]
    if expected is None:
        expected = hidden.new_zeros(batch, 0, KINDS[kind][2])
    kv, score = part.kv_proj(hidden), part.gate_proj(hidden)
    return Case(kind, kv, score, part.position_bias.clone(), part.kv_norm.weight.clone(), expected)


class Caches:
    """State, pool and block table of a batch. All bytes are poison, the pages of the sequences are shuffled."""

    def __init__(self, case, batch, entries, form="plain"):
        self.case, self.form = case, form
        max_pages = -(-max(entries, 1) // PAGE_SIZE)
        self.state = torch.full((batch, case.slots, 2, case.kv.shape[2]), math.nan)
        pages = batch * max_pages + 1
        if form == "plain":
            self.pool = torch.full((pages, PAGE_SIZE * case.dim + 3), math.nan)
        else:
            self.pool = torch.full((pages, page_bytes(case, form) + 5), POISON, dtype=torch.uint8)
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(3))[: batch * max_pages]
        self.block_table = order.view(batch, max_pages).int()
        self.rope = table(256)

    def op(self):
        name = (
            "index_compress_append_" + self.form if self.case.kind == "index" else self.case.kind + "_compress_append"
        )
        return getattr(OPS, name)

    def arguments(self, kv, score, positions):
        case = self.case
        return (
            self.state, self.pool, kv, score, case.ape, case.norm_weight, self.rope, self.block_table, positions, EPS,
            case.ratio, PAGE_SIZE,
        )  # fmt: skip

    def feed(self, starts, counts, rows=None):
        """One call: sequence b gets counts[b] tokens from position starts[b], padded with garbage to `rows`."""
        case, rows = self.case, rows or max(counts)
        kv, score = (torch.full((len(starts), rows, case.kv.shape[2]), math.nan) for _ in range(2))
        positions = torch.full((len(starts), rows), -1, dtype=torch.int32)
        for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
            kv[b, :count], score[b, :count] = (t[b, start : start + count] for t in (case.kv, case.score))
            positions[b, :count] = torch.arange(start, start + count)
        self.op()(*self.arguments(kv, score, positions))

    def entry(self, b, w):
        """Entry w of sequence b in a plain pool."""
        offset = w % PAGE_SIZE * self.case.dim
        return self.pool[self.block_table[b, w // PAGE_SIZE], offset : offset + self.case.dim]

    def assert_entries(self, lengths):
        """Exactly the completed entries are written, with the values of transformers."""
        case, expected = self.case, torch.full_like(self.pool, math.nan)
        for b, length in enumerate(lengths):
            for w in range(length // case.ratio):
                assert checks.relative_error(self.entry(b, w), case.expected[b, w]) < TOLERANCE, (
                    f"sequence {b} entry {w}"
                )
                offset = w % PAGE_SIZE * case.dim
                expected[self.block_table[b, w // PAGE_SIZE], offset : offset + case.dim] = self.entry(b, w)
        checks.assert_bits_equal(self.pool, expected)

    def assert_state(self, lengths, before=None):
        """Bit for bit: slot p % slots holds the latest such p, other slots what was there before."""
        case = self.case
        expected = torch.full_like(self.state, math.nan) if before is None else before
        for b, length in enumerate(lengths):
            for p in range(max(0, length - case.slots), length):
                expected[b, p % case.slots, 0] = case.kv[b, p]
                expected[b, p % case.slots, 1] = case.score[b, p] + case.ape[p % case.ratio]
        checks.assert_bits_equal(self.state, expected)


def page_bytes(case, form):
    """Bytes of a page of 2, written out: fp8/bf16 KV with 8 scale bytes, fp8 keys + fp32, fp4 keys + a byte per 32."""
    entry = {"kv": 64 + 2 * ROPE_DIM + 8, "fp8": INDEX_DIM + 4, "fp4": INDEX_DIM // 2 + INDEX_DIM // 32}
    return PAGE_SIZE * entry[form]
