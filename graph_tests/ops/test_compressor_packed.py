"""Packed pools of the compressors: every byte against a composition by hand of pool, norm, rope and quantiser."""

import math

import pytest
import torch

from graph_tests import checks
from graph_tests.ops.by_hand import e4m3_bytes, fp4_by_hand, fp8_by_hand, hadamard_by_hand, rope_by_hand
from graph_tests.ops.compressor_cases import EPS, PAGE_SIZE, Caches, make_case


def kv_by_hand(entry):
    """Data and scale bytes of a packed KV entry: E4M3 over 2^ceil(log2(amax / 448)), BF16 rope, one scale, padding."""
    exponent = math.ceil(math.log2(max(entry[:64].abs().max().item(), 1e-4) / 448))
    rope = entry[64:].bfloat16().view(torch.uint8)
    return torch.cat((e4m3_bytes(entry[:64].float() * 2.0**-exponent), rope)), torch.tensor([exponent + 127] + [0] * 7)


def pooled_by_hand(case, b, w):
    """Softmax pooling of one entry, from its 4, 8 or 16 rows."""
    first = w * case.ratio
    half = slice(case.dim, None) if case.kind != "hca" else slice(None)
    rows = [(p, half) for p in range(first, first + case.ratio)]
    if case.kind != "hca" and w > 0:
        rows = [(p, slice(0, case.dim)) for p in range(first - case.ratio, first)] + rows
    kv = torch.stack([case.kv[b, p, channels] for p, channels in rows])
    score = torch.stack([case.score[b, p, channels] + case.ape[p % case.ratio, channels] for p, channels in rows])
    return (kv * score.softmax(0)).sum(0)


def key_by_hand(case, b, w, rope):
    """Pool, norm, rope of one entry, each rounded to bf16."""
    pooled = pooled_by_hand(case, b, w).bfloat16().float()
    normed = (case.norm_weight * (pooled * torch.rsqrt(pooled.square().mean() + EPS))).bfloat16()
    return rope_by_hand(normed, rope[w * case.ratio]).bfloat16()


@pytest.mark.parametrize(("kind", "form"), (("csa", "kv"), ("hca", "kv"), ("index", "fp8"), ("index", "fp4")))
def test_packed_entries_are_byte_equal_to_their_composition(kind, form):
    """All bytes of the pool: entries data then scales in each page, and nothing else touched."""
    case = make_case(kind, 2, 37, seed=1)
    caches = Caches(case, 2, 37, form)
    expected = caches.pool.clone()
    caches.feed([0, 0], [21, 6])
    caches.feed([21, 6], [16, 30])
    by_hand = {"kv": kv_by_hand, "fp8": fp8_by_hand, "fp4": fp4_by_hand}[form]
    for b, length in enumerate((37, 36)):
        for w in range(length // case.ratio):
            key = key_by_hand(case, b, w, caches.rope)
            data, scale = by_hand(hadamard_by_hand(key) if kind == "index" else key)
            page, place = expected[caches.block_table[b, w // PAGE_SIZE]], w % PAGE_SIZE
            page[place * len(data) : (place + 1) * len(data)] = data
            scales = PAGE_SIZE * len(data) + place * len(scale)
            page[scales : scales + len(scale)] = scale
    checks.assert_bits_equal(caches.pool, expected)
