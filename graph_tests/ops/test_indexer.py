"""The lightning indexer against transformers' module (fp32), its formats against compositions by hand, and recall."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4CSACache, DeepseekV4Indexer

import dsv4_ops.ops  # noqa: F401  registers the ops
from dsv4_ops.ops.rope import rope_table
from graph_tests import checks
from graph_tests.ops.by_hand import fp4_values, hadamard_by_hand

OPS = torch.ops.dsv4
HIDDEN, HEADS, DIM, ROPE_DIM, RATIO, PAGE_SIZE = 32, 16, 64, 32, 4, 8
THETA, EPS = 1.6e5, 1e-6


def table(length=1024):
    return rope_table(ROPE_DIM, length, THETA)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def shuffled_pages(batch, max_pages):
    """A block table that uses all pages but the last in random order."""
    order = torch.randperm(batch * max_pages, generator=torch.Generator().manual_seed(3))
    return order.view(batch, max_pages).int()


def plain_pool(keys, max_pages):
    """keys [B, N, D] -> pool and block table; whatever holds no key is NaN."""
    batch, count, dim = keys.shape
    block_table = shuffled_pages(batch, max_pages)
    pool = torch.full((batch * max_pages + 1, PAGE_SIZE * dim + 3), math.nan)
    for b in range(batch):
        for entry in range(count):
            offset = entry % PAGE_SIZE * dim
            pool[block_table[b, entry // PAGE_SIZE], offset : offset + dim] = keys[b, entry]
    return pool, block_table


# ---- against transformers ----


@torch.no_grad()
def judged(batch, length, k):
    """Queries, weights, keys, scores and picks of transformers' indexer with random weights."""
    torch.manual_seed(0)
    config = DeepseekV4Config(
        hidden_size=HIDDEN, head_dim=DIM, qk_rope_head_dim=ROPE_DIM, q_lora_rank=16, num_hidden_layers=2, index_topk=k,
        index_n_heads=HEADS, index_head_dim=DIM, compress_rope_theta=THETA,
        compress_rates={"compressed_sparse_attention": RATIO, "heavily_compressed_attention": 16},
    )  # fmt: skip
    module, cache = DeepseekV4Indexer(config), DeepseekV4CSACache(config)
    for parameter in module.parameters():
        parameter.normal_(std=1.0 if parameter.dim() == 1 else 0.4)
    hidden, residual = torch.randn(batch, length, HIDDEN), torch.randn(batch, length, 16)
    recorded = []
    module.scorer.register_forward_hook(lambda scorer, arguments, scores: recorded.append(scores))
    positions = torch.arange(length).expand(batch, -1)
    picks = module(hidden, residual, positions, SimpleNamespace(layers=[cache]), 0)
    q = module.q_b_proj(residual).unflatten(-1, (HEADS, DIM))
    weights = module.scorer.weights_proj(hidden)
    return SimpleNamespace(q=q, weights=weights, keys=cache.compressed_kv["indexer"], scores=recorded[0], picks=picks)


def rows_of(tensor, positions):
    """Rows of each sequence at these positions; a row at -1 is NaN."""
    rows = torch.stack([tensor[b, position.clamp_min(0).long()] for b, position in enumerate(positions)])
    return rows.masked_fill((positions < 0).view(*positions.shape, *(1,) * (rows.dim() - 2)), math.nan)


POSITIONS = {
    "prefill of several query blocks": torch.arange(150).expand(3, -1),
    "one token of each sequence": torch.tensor([[3], [149], [77]]),
    "ragged": torch.tensor([[0, 1, 2, 3, 4, -1], [-1] * 6, [144, 145, 146, 147, 148, 149]]),
}


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("k", (1, 5, 16, 64))
def test_plain_scores_and_picks_agree_with_transformers(positions, k):
    """Scores to fp32 noise: 64-term products summed over 16 heads in another order. Picks exactly."""
    judge, positions = judged(3, 150, k), positions.int()
    pool, block_table = plain_pool(judge.keys, max_pages=6)
    q, w = OPS.index_query_plain(rows_of(judge.q, positions), rows_of(judge.weights, positions), table(), positions)
    arguments = (q, w, pool, block_table, positions, RATIO, PAGE_SIZE)
    scores, picks = OPS.index_scores_plain(*arguments), OPS.index_topk_plain(*arguments, k)
    for b in range(3):
        for s, position in enumerate(positions[b].tolist()):
            visible = (position + 1) // RATIO
            assert (scores[b, s, visible:] == -math.inf).all()
            expected = judge.scores[b, position, :visible]
            assert checks.relative_error(scores[b, s, :visible], expected) < 2e-6 or visible == 0
            wanted = sorted(pick for pick in judge.picks[b, position].tolist() if pick >= 0) if position >= 0 else []
            assert picks[b, s].tolist() == wanted + [-1] * (k - len(wanted))


# ---- scores of the packed formats ----


def packed_pool(form, batch, max_pages, filled):
    """Random codes under scales around 1, and the keys that they mean. Entries from `filled` on hold NaN bytes."""
    data, scale = (DIM, 4) if form == "fp8" else (DIM // 2, DIM // 32)
    block_table = shuffled_pages(batch, max_pages)
    pool = torch.full((batch * max_pages + 1, PAGE_SIZE * (data + scale) + 3), 0xFF, dtype=torch.uint8)
    keys = torch.zeros(batch, max_pages * PAGE_SIZE, DIM, dtype=torch.float64)
    for b, entry in ((b, entry) for b in range(batch) for entry in range(filled)):
        page, place = pool[block_table[b, entry // PAGE_SIZE]], entry % PAGE_SIZE
        codes = torch.randint(0, 256, (data,), dtype=torch.uint8)
        if form == "fp8":
            codes[codes % 128 == 127] = 0
            scales = torch.tensor([0.3 + 0.01 * entry])
            keys[b, entry] = codes.view(torch.float8_e4m3fn).double() * scales.double()
        else:
            scales = torch.randint(125, 130, (scale,), dtype=torch.uint8)
            keys[b, entry] = fp4_values(codes, scales)
        page[place * data : (place + 1) * data] = codes
        page[PAGE_SIZE * data + place * scale :][:scale] = scales.view(torch.uint8)
    return pool, block_table, keys


@pytest.mark.parametrize("form", ("fp8", "fp4"))
def test_packed_scores_are_their_definition_and_ignore_what_is_not_visible(form):
    """fp64 on the dequantised operands; a fp32 sum of 64 products, then of 3 heads, errs by less than 70 * 2^-24 of the
    sum of magnitudes."""
    torch.manual_seed(0)
    pool, block_table, keys = packed_pool(form, 2, max_pages=3, filled=10)
    positions, w = torch.tensor([[0, 2, 3, 4, 39], [-1, 6, 7, 8, 38]]).int(), random(2, 5, 3, seed=4)
    if form == "fp8":
        q = (random(2, 5, 3, DIM, seed=5).to(torch.float8_e4m3fn),)
        values = q[0].double()
    else:
        codes, scales = torch.randint(0, 256, (2, 5, 3, DIM // 2)), torch.randint(125, 130, (2, 5, 3, DIM // 32))
        q = (codes.to(torch.uint8), scales.to(torch.uint8))
        values = fp4_values(*q)
    scores = getattr(OPS, f"index_scores_{form}")(*q, w, pool, block_table, positions, RATIO, PAGE_SIZE)
    expected = (torch.einsum("bshd,bcd->bshc", values, keys).relu() * w.double()[..., None]).sum(2)
    bound = torch.einsum("bshd,bcd,bsh->bsc", values.abs(), keys.abs(), w.double().abs()) * 70 * 2**-24
    visible = torch.arange(24) < torch.tensor([[0, 0, 1, 1, 10], [0, 1, 2, 2, 9]])[..., None]
    assert ((scores - expected).abs() <= bound)[visible].all()
    assert (scores[~visible] == -math.inf).all()


# ---- recall ----


def recall(form, count, k, keys_form=None, seed=0):
    """Share of the plain picks that `form` finds, everything through the ops: compressor, query, top-k."""
    torch.manual_seed(seed)
    kv, score = torch.randn(1, count * RATIO, 2 * DIM), torch.randn(1, count * RATIO, 2 * DIM)
    ape, norm_weight = torch.randn(RATIO, 2 * DIM), torch.rand(DIM) + 0.5
    q, weights = torch.randn(1, 1, HEADS, DIM), torch.randn(1, 1, HEADS)
    positions, last = torch.arange(count * RATIO)[None].int(), torch.tensor([[count * RATIO - 1]]).int()
    picks = {}
    for name in ("plain", form):
        pages = count // PAGE_SIZE
        width = {"plain": DIM, "fp8": DIM + 4, "fp4": DIM // 2 + DIM // 32}[name] * PAGE_SIZE
        pool = torch.zeros(pages, width, dtype=torch.float32 if name == "plain" else torch.uint8)
        state, block_table = torch.zeros(1, 2 * RATIO, 2, 2 * DIM), shuffled_pages(1, pages)
        getattr(OPS, f"index_compress_append_{name}")(
            state, pool, kv, score, ape, norm_weight, table(), block_table, positions, EPS, RATIO, PAGE_SIZE
        )
        queries = getattr(OPS, f"index_query_{name}")(q, weights, table(), last)
        if keys_form == "query not transformed" and name != "plain":
            undone = hadamard_by_hand(OPS.index_query_plain(q, weights, table(), last)[0].bfloat16())
            queries = getattr(OPS, f"index_query_{name}")(undone, weights, table(), torch.zeros_like(last))
        picks[name] = getattr(OPS, f"index_topk_{name}")(*queries, pool, block_table, last, RATIO, PAGE_SIZE, k)
    return len(set(picks["plain"].flatten().tolist()) & set(picks[form].flatten().tolist())) / k


@pytest.mark.parametrize(("form", "least"), (("fp8", 0.9), ("fp4", 0.7)))
def test_packed_formats_recall_the_plain_picks(form, least):
    """Hadamard on both sides cancels: what is lost is rounding. On one side the picks are near chance, 32 of 256."""
    assert sum(recall(form, 256, 32, seed=seed) for seed in range(4)) / 4 > least
    one_sided = sum(recall(form, 256, 32, "query not transformed", seed=seed) for seed in range(4)) / 4
    assert one_sided < 0.4
