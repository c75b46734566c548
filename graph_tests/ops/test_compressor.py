"""Compressors against transformers' modules (fp32, plain pools), however the tokens arrive."""

import math
import random

import pytest
import torch

from graph_tests import checks
from graph_tests.ops.compressor_cases import EPS, HEAD_DIM, KINDS, OPS, Caches, make_case


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", (1, 3, 4, 5, 8, 15, 16, 17, 32, 47, 64))
def test_prefill_agrees_with_transformers(kind, length):
    case = make_case(kind, 2, length)
    caches = Caches(case, 2, length)
    caches.feed([0, 0], [length, length])
    caches.assert_entries([length, length])
    caches.assert_state([length, length])


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_at_a_time_agrees_with_transformers(kind):
    case = make_case(kind, 2, 50)
    caches = Caches(case, 2, 16)
    for position in range(50):
        caches.feed([position] * 2, [1, 1])
        caches.assert_state([position + 1] * 2)
    caches.assert_entries([50, 50])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_ragged_random_chunks_agree_with_transformers(kind, seed):
    """Every sequence at its own position, chunks of 0 to 40 rows, padded with NaN rows at position -1."""
    batch, length = 4, 90
    case, choose = make_case(kind, batch, length, seed), random.Random(seed)
    caches, done = Caches(case, batch, length), [0] * batch
    while min(done) < length:
        largest = choose.choice((1, 3, 7, 20, 40))
        counts = [min(choose.randint(0, largest), length - at) for at in done]
        if not any(counts):
            continue
        caches.feed(done, counts, rows=max(counts) + choose.choice((0, 0, 1, 5)))
        done = [at + count for at, count in zip(done, counts, strict=True)]
        caches.assert_state(done)
    caches.assert_entries(done)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", (1, 2, 3, 4, 5, 16, 17))
def test_state_of_an_earlier_longer_sequence_is_never_read(kind, first):
    """Whatever stands in the state, NaN and infinite scores included: a new sequence starts as if it were clean."""
    case = make_case(kind, 2, 40)
    for stale in (math.nan, math.inf, 1e30):
        caches = Caches(case, 2, 40)
        caches.state.fill_(stale)
        caches.feed([0, 0], [first, first])
        for position in range(first, 40):
            caches.feed([position] * 2, [1, 1])
        caches.assert_entries([40, 40])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_token_write_nothing(kind):
    case = make_case(kind, 3, 40)
    caches = Caches(case, 3, 40)
    caches.feed([0, 0, 0], [40, 0, 9])
    caches.assert_entries([40, 0, 9])
    caches.assert_state([40, 0, 9])
    pool, state = caches.pool.clone(), caches.state.clone()
    caches.feed([0, 0, 0], [0, 0, 0], rows=5)
    checks.assert_bits_equal(caches.pool, pool)
    checks.assert_bits_equal(caches.state, state)


def test_first_entry_of_csa_has_no_predecessor():
    """By hand, one channel pair: four tokens with equal scores pool to the mean of their own half."""
    case = make_case("csa", 1, 4)
    case.kv = torch.zeros(1, 4, 2 * HEAD_DIM)
    case.kv[..., :HEAD_DIM] = 1e6  # for the next group; must not reach entry 0
    case.kv[..., HEAD_DIM] = torch.tensor([1.0, 2.0, 3.0, 6.0])
    case.score, case.ape = torch.zeros_like(case.kv), torch.zeros_like(case.ape)
    case.norm_weight = torch.ones(HEAD_DIM)
    caches = Caches(case, 1, 1)
    caches.feed([0], [4])
    # channel 0 has the mean 3, the other 95 have 0
    assert caches.entry(0, 0)[0].item() == pytest.approx(3 / math.sqrt(9 / HEAD_DIM + EPS), rel=1e-6)
    assert caches.entry(0, 0)[1:].abs().max() == 0


FORMS = (("csa", "plain"), ("csa", "kv"), ("hca", "plain"), ("hca", "kv"), ("index", "plain"), ("index", "fp8"),
         ("index", "fp4"))  # fmt: skip


def arguments_of(kind, form, batch, rows, layout=lambda tensor: tensor):
    """Chunks that start at 3, 4, 5, ...; every third sequence has no token."""
    case = make_case(kind, max(batch, 1), max(rows, 1))
    caches = Caches(case, batch, 64, form)
    caches.state.zero_()
    positions = torch.arange(3, 3 + rows) + torch.arange(batch)[:, None] % 4
    positions[2::3] = -1
    arguments = caches.arguments(case.kv[:batch, :rows], case.score[:batch, :rows], positions.int())
    return tuple(layout(value) if index in (2, 3, 4) else value for index, value in enumerate(arguments))


def name_of(kind, form):
    return f"index_compress_append_{form}" if kind == "index" else f"{kind}_compress_append"


@pytest.mark.parametrize(("kind", "form"), FORMS)
@pytest.mark.parametrize("batch", (0, 1, 2, 7, 64))
@pytest.mark.parametrize("rows", (0, 1, 17))
def test_op_contract(kind, form, batch, rows):
    for layout in (lambda tensor: tensor, checks.row_strided):
        checks.check_op(name_of(kind, form), arguments_of(kind, form, batch, rows, layout))


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_op_writes_state_and_pool(kind, form):
    checks.assert_mutates(name_of(kind, form), arguments_of(kind, form, 2, 17))


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_fake_does_not_specialise_on_the_batch(kind, form):
    checks.check_symbolic_batch(name_of(kind, form), lambda batch: arguments_of(kind, form, batch, 6))


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_opcheck(kind, form):
    checks.opcheck(name_of(kind, form), arguments_of(kind, form, 2, 6))


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    (
        (0, torch.zeros(2, 4, 2, 2 * HEAD_DIM), "state must be"),
        (1, torch.zeros(3, 5, dtype=torch.uint8), "pool must be"),
        (1, torch.zeros(3, 5), "pool must be"),
        (2, torch.zeros(2, 6, 2 * HEAD_DIM, dtype=torch.bfloat16), "kv must be"),
        (3, torch.zeros(2, 6, HEAD_DIM), "score must be"),
        (4, torch.zeros(8, 2 * HEAD_DIM), "ape must be"),
        (6, torch.zeros(64, HEAD_DIM + 2), "rope_table must be"),
        (6, torch.zeros(64, 30), "multiple of 64"),
        (7, torch.zeros(2, 3, dtype=torch.int64), "block_table must be"),
        (8, torch.zeros(2, 6, dtype=torch.int64), "positions must be"),
    ),
)
def test_wrong_arguments_are_refused_by_name(index, wrong, message):
    arguments = list(arguments_of("csa", "kv", 2, 6))
    arguments[index] = wrong
    with pytest.raises(ValueError, match=rf"dsv4::csa_compress_append: .*{message}"):
        OPS.csa_compress_append(*arguments)
