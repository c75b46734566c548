"""Kernels of the family `compressor` against their references."""

import math
import random
from dataclasses import replace

import pytest
import torch

from graph_tests.checks import assert_bits_equal
from graph_tests.cuda.compressor_inputs import ALL, CSA, HCA, INDEX_FP4, INDEX_FP8, SMALL, Shape, Stream, name
from graph_tests.cuda.kernel_checks import bits, check_kernel, on_cuda

pytestmark = pytest.mark.cuda

OPS = torch.ops.dsv4
RELEASED = (CSA, HCA, INDEX_FP8, INDEX_FP4)
SANITIZED = (*RELEASED, *SMALL)


def op(shape: Shape):
    return getattr(OPS, shape.op)


def starts_of(shape: Shape, batch: int, rows: int, seed: int = 0) -> list[int]:
    """Starts from which one row completes a group, or many do, or none; some sequences are new."""
    choose, ratio = random.Random(seed), shape.ratio
    ends = (ratio - 1, 2 * ratio - 1, 3 * ratio - 1)
    return [choose.choice((0, *ends, max(0, 3 * ratio - rows), choose.randrange(3 * ratio))) for _ in range(batch)]


def counts_of(batch: int, rows: int) -> list[int]:
    """All rows are tokens, or a few less, and every third sequence has none."""
    return [0 if b % 3 == 2 else max(0, rows - b % 2) for b in range(batch)]


def check(shape: Shape, batch: int, rows: int, *, exact: bool, seed: int = 0) -> None:
    starts, counts = starts_of(shape, batch, rows, seed), counts_of(batch, rows)
    stream = Stream(shape, batch, 3 * shape.ratio + rows, exact=exact, seed=seed)
    judge = bits if exact else stream.pool_judge(starts, counts)
    check_kernel(shape.op, stream.call(starts, counts, rows), (bits, judge))


@pytest.mark.parametrize("shape", ALL, ids=name)
@pytest.mark.parametrize(("batch", "rows"), ((1, 1), (4, 2), (4, 8), (4, 9), (4, 45)))
def test_exact_sums_have_the_bits_of_the_reference(shape, batch, rows):
    """Scores that differ by ape alone, integers for kv: nothing is rounded before the norm's input."""
    for seed in range(3 if rows == 1 else 1):
        check(shape, batch, rows, exact=True, seed=seed)


@pytest.mark.parametrize("shape", ALL, ids=name)
@pytest.mark.parametrize(("batch", "rows"), ((4, 1), (4, 8), (4, 45)))
def test_random_tokens_agree_with_the_reference(shape, batch, rows):
    check(shape, batch, rows, exact=False, seed=1)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", SANITIZED, ids=name)
@pytest.mark.parametrize("rows", (1, 9))
def test_small_call(shape, rows):
    stream = Stream(shape, 2, 2 * shape.ratio + rows, seed=2)
    starts = [2 * shape.ratio - 1, shape.ratio]
    op(shape)(*on_cuda(stream.call(starts, [rows, rows - 1])))


@pytest.mark.parametrize("shape", (CSA, INDEX_FP4, SMALL[2]), ids=name)
def test_many_sequences(shape):
    check(shape, 130, 1, exact=True)


@pytest.mark.parametrize("shape", (CSA, INDEX_FP8), ids=name)
def test_a_cta_of_a_long_chunk_takes_several_groups(shape):
    rows = 1700 if shape is CSA else 6500  # more groups than CTAs in a wave
    stream = Stream(shape, 1, rows + 2, exact=True)
    check_kernel(shape.op, stream.call([2], [rows]), bits)


def feed(stream: Stream, chunks) -> tuple:
    """State and pool on the GPU after chunks of (starts, counts, rows)."""
    state, pool = (tensor.cuda() for tensor in (stream.state([0] * stream.batch), stream.pool()))
    for starts, counts, rows in chunks:
        _, _, *others = stream.arguments(state, pool, stream.chunk(starts, counts, rows))
        op(stream.shape)(state, pool, *on_cuda(tuple(others)))
    return state, pool


def random_chunks(batch: int, length: int, sizes: tuple, choose: random.Random):
    done = [0] * batch
    while min(done) < length:
        counts = [min(choose.choice(sizes), length - at) for at in done]
        if any(counts):
            yield list(done), counts, max(counts) + choose.choice((0, 0, 2))
        done = [at + count for at, count in zip(done, counts, strict=True)]


@pytest.mark.parametrize("shape", (*RELEASED, *SMALL), ids=name)
def test_every_split_into_chunks_gives_the_bits_of_one_token_at_a_time(shape):
    batch, length = 3, 2 * shape.ratio + 20
    stream = Stream(shape, batch, length, seed=4)
    one_at_a_time = feed(stream, (([at] * batch, [1] * batch, 1) for at in range(length)))
    for seed, sizes in enumerate(((length,), (0, 1, 2), (0, 1, 3, 5, 8), (0, 2, 9, 17, 40), (0, 30, 70))):
        split = feed(stream, random_chunks(batch, length, sizes, random.Random(seed)))
        for actual, expected in zip(split, one_at_a_time, strict=True):
            assert_bits_equal(actual.cpu(), expected.cpu())


@pytest.mark.parametrize("shape", RELEASED, ids=name)
@pytest.mark.parametrize("rows", (1, 40))
def test_a_sequence_alone_has_the_bits_that_it_has_in_a_batch(shape, rows):
    batch = 5
    starts, counts = starts_of(shape, batch, rows), counts_of(batch, rows)
    stream = Stream(shape, batch, 3 * shape.ratio + rows, seed=5)
    together = on_cuda(stream.call(starts, counts, rows))
    apart = on_cuda(stream.call(starts, counts, rows))
    op(shape)(*together)
    for b in range(batch):
        one = [tensor[b : b + 1] if place in (0, 2, 3, 7, 8) else tensor for place, tensor in enumerate(apart)]
        op(shape)(*one)
    for place in (0, 1):
        assert_bits_equal(apart[place].cpu(), together[place].cpu())


@pytest.mark.parametrize("shape", (*RELEASED, *SMALL), ids=name)
def test_state_of_an_earlier_sequence_is_never_used(shape):
    """A new sequence behind a state of infinite scores."""
    stream = Stream(shape, 2, 2 * shape.ratio + 8, exact=True)
    counts = [shape.ratio + 3, 2 * shape.ratio + 8]
    arguments = stream.call([0, 0], counts)
    arguments[0].fill_(math.inf)
    check_kernel(shape.op, arguments, bits)


@pytest.mark.parametrize("shape", (CSA, INDEX_FP8, INDEX_FP4), ids=name)
def test_a_position_that_is_not_the_guessed_one(shape):
    """The guess is cut to the rope table, which ends before the position here, though not before its group."""
    stream = Stream(shape, 5, 8, exact=True)
    arguments = list(stream.call([7, 6, 5, 3, 0], [1, 1, 1, 1, 0], 1))
    arguments[6] = arguments[6][: shape.ratio + 1]
    check_kernel(shape.op, tuple(arguments), bits)


@pytest.mark.parametrize("shape", ALL, ids=name)
@pytest.mark.parametrize(("batch", "rows"), ((0, 1), (0, 20), (3, 0), (3, 1), (3, 20)))
def test_calls_without_tokens_write_nothing(shape, batch, rows):
    stream = Stream(shape, batch, 3)
    check_kernel(shape.op, stream.call([0] * batch, [0] * batch, rows), bits)


@pytest.mark.parametrize("shape", RELEASED, ids=name)
@pytest.mark.parametrize("rows", (1, 12))
def test_strided_arguments(shape, rows):
    """kv and score as two parts of one projection, rows of a larger block table and of larger positions."""
    batch = 3
    stream = Stream(shape, batch, 3 * shape.ratio + rows, exact=True)
    starts, counts = starts_of(shape, batch, rows, 1), counts_of(batch, rows)
    arguments = list(stream.call(starts, counts, rows))
    width = arguments[2].shape[2]
    arguments[2], arguments[3] = torch.cat(arguments[2:4], dim=2).split(width, dim=2)
    for place, filler in ((7, 1 << 30), (8, -1)):
        wide = torch.full((batch, arguments[place].shape[1] + 3), filler, dtype=torch.int32)
        view = wide[:, : arguments[place].shape[1]]
        arguments[place] = view.copy_(arguments[place])
    check_kernel(shape.op, tuple(arguments), bits)


@pytest.mark.parametrize("shape", (*RELEASED, replace(CSA, form="plain"), replace(HCA, form="plain")), ids=name)
@pytest.mark.parametrize("one_token", (True, False))
def test_infinite_and_nan_tokens_agree_with_the_reference(shape, one_token):
    """NaN and infinities where the reference has them. A score of -inf weighs nothing, unless a whole group has it."""
    length = 2 * shape.ratio * shape.halves
    stream = Stream(shape, 6, length, seed=6)
    stream.score[0, :, 3] = math.nan
    stream.score[1, :, 5 :: shape.dim] = -math.inf
    stream.score[2, ::2, 6] = -math.inf
    stream.score[3, 1::2, 7] = math.inf
    stream.score[4, ::2], stream.score[4, :, 8] = -math.inf, torch.finfo(torch.float32).min
    stream.score[5, ::2, 9], stream.kv[5, ::2, 9] = -math.inf, math.inf
    starts, counts = ([length - 1] * 6, [1] * 6) if one_token else ([0] * 6, [length] * 6)
    arguments = stream.call(starts, counts)
    device_arguments = on_cuda(arguments)
    op(shape)(*device_arguments)
    op(shape)(*arguments)
    torch.testing.assert_close(device_arguments[0].cpu(), arguments[0], rtol=0, atol=0, equal_nan=True)
    groups = stream.groups(starts, counts)
    actual, expected = (
        shape.read(pool, stream.block_table, groups) for pool in (device_arguments[1].cpu(), arguments[1])
    )
    assert expected[[2, 4]].isfinite().all() and expected[[0, 1, 3, 5], -1].isnan().all()
    # one step of a code (E2M1: a third of a value below 6) where the pool is quantised
    relative, absolute = {"plain": (1e-5, 1e-5), "fp4": (0.5, 0.5)}.get(shape.form, (2**-3, 0.05))
    torch.testing.assert_close(actual, expected, rtol=relative, atol=absolute, equal_nan=True)


def test_offsets_beyond_2_to_the_31_bytes():
    """An entry in the last page of a pool of 2.2 GB is that of the same token in a small pool."""
    stream = Stream(CSA, 1, 8, seed=7)
    arguments = on_cuda(stream.call([7], [1]))
    stride = arguments[1].shape[1] // 8 * 8
    pool = torch.zeros(2_200_000_000 // stride, stride, dtype=torch.uint8, device="cuda")
    assert (len(pool) - 1) * stride > 2**31
    small = torch.zeros(1, stride, dtype=torch.uint8, device="cuda")
    for where in (pool, small):
        table = torch.full_like(arguments[7], len(where) - 1)
        OPS.csa_compress_append(arguments[0], where, *arguments[2:7], table, *arguments[8:])
    assert small.any() and torch.equal(pool[-1:], small)


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    (
        (0, torch.zeros(2, 4, 2, 1024), r"state must be \[2, 8, 2, 1024\] float32"),
        (1, torch.zeros(3, 64 * 584 - 8, dtype=torch.uint8), r"pool must be \[pages, page stride >= 37376\]"),
        (1, torch.zeros(3, 64 * 584 + 2, dtype=torch.uint8), "pool must be rows that start at multiples of 8 bytes"),
        (2, torch.zeros(2, 6, 1024, dtype=torch.bfloat16), "kv must be .* float32"),
        (3, torch.zeros(2, 6, 512), r"score must be \[2, 6, 1024\] float32"),
        (4, torch.zeros(8, 1024), r"ape must be \[4, 1024\] float32"),
        (5, torch.zeros(512, dtype=torch.float16), "norm_weight must be"),
        (6, torch.zeros(64, 66), "norm_weight must be .*multiple of 64"),
        (7, torch.zeros(2, 3, dtype=torch.int64), "block_table must be"),
        (8, torch.zeros(2, 6, dtype=torch.int64), "positions must be"),
        (10, 40000, "state must be that of a ratio from 1 to"),
        (11, 0, "pool must be read with a page_size of at least 1"),
    ),
)
def test_wrong_arguments_are_refused_by_name(place, wrong, message):
    arguments = list(on_cuda(Stream(CSA, 2, 8).call([0, 0], [6, 6])))
    arguments[place] = wrong.cuda() if isinstance(wrong, torch.Tensor) else wrong
    with pytest.raises(RuntimeError, match=f"dsv4::csa_compress_append: {message}"):
        OPS.csa_compress_append(*arguments)


def test_index_keys_of_other_widths_are_refused():
    arguments = on_cuda(Stream(replace(INDEX_FP8, dim=256), 1, 8).call([0], [6]))
    with pytest.raises(RuntimeError, match="dsv4::index_compress_append_fp8: norm_weight must be .* 32, 64 or 128"):
        OPS.index_compress_append_fp8(*arguments)
