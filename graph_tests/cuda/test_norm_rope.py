"""q_norm_rope, kv_norm_rope_append and qkv_norm_rope_append against their references.

Rows of small integers have sums of squares that are exact in any order: then every bit is that of the reference. Other
rows are compared by a tolerance.
"""

import pytest
import torch

from dsv4_ops.ops import pages
from dsv4_ops.ops.rope import rope_table
from graph_tests.checks import assert_bits_equal, row_strided
from graph_tests.cuda.kernel_checks import almost_bits, assert_rows_independent, bits, check_kernel, close, on_cuda

pytestmark = pytest.mark.cuda

OPS = torch.ops.dsv4
EPS = 1e-6
BF16, F32 = torch.bfloat16, torch.float32
PRO = (128, 512, 64)  # H, D, R
# D - R is a multiple of 64; 192 is less than a warp's octets, 328 ends within one, 1024 takes four octets a lane
SHAPES = [(64, 512, 64), (3, 192, 64), (5, 328, 8), (2, 1024, 64)]
PLAIN_SHAPES = [(64, 512, 64), (2, 32, 16), (3, 40, 6), (4, 64, 64)]
TOKENS = [(0, 1), (1, 1), (3, 2), (2, 7)]  # B, S
PAGE_SIZE = 4
# A rounding to bf16 that falls the other way (2^-8 of a value), and what a sum in another order leaves where a rotation
# cancels: 2^-22 of the values of a row, which are below 23, times a weight below 12.
ROUNDED = {BF16: close(2.0**-7, 1e-4), F32: close(1e-5, 1e-4)}
# That happens to one bf16 in 2^22 / 2^8; then its code may change, or the scale and the 64 codes of its group.
ALMOST = almost_bits(2e-3, 255)


def integers(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


def normal(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def positions_of(batch: int, rows: int) -> torch.Tensor:
    """Consecutive ones, from another start in each sequence; the last token of the first one and one sequence lack."""
    positions = torch.arange(rows, dtype=torch.int32) + 37 * torch.arange(batch, dtype=torch.int32)[:, None] % 200
    if batch and rows > 1:
        positions[0, -1] = -1
    if batch > 1:
        positions[1] = -1
    return positions


def angles_of(tokens, shape) -> torch.Tensor:
    return rope_table(shape[2], 200 + tokens[1], 1e4)


def heads(tokens, shape, dtype=BF16, make=integers) -> tuple:
    """q, rope_table, positions, eps."""
    return make(*tokens, *shape[:2], dtype=dtype), angles_of(tokens, shape), positions_of(*tokens), EPS


def window_rows(tokens, shape, dtype=BF16, make=integers, *, plain=False, weight_dtype=F32) -> tuple:
    """pool, kv, weight, rope_table, block_table, positions, eps, page_size: the shortest ring for the chunk."""
    (batch, rows), (_, dim, rope_dim) = tokens, shape
    pages_of_sequence = -(-rows // PAGE_SIZE)
    count = batch * pages_of_sequence + 1
    if plain:
        pool = torch.full((count, PAGE_SIZE * dim + 4), -7.0)
    else:
        pool = torch.full((count, PAGE_SIZE * sum(pages.kv_entry_bytes(dim, rope_dim)) + 8), 0xA5, dtype=torch.uint8)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(batch))[: count - 1]
    table = order.view(batch, pages_of_sequence).int()
    weight = normal(dim, dtype=weight_dtype, seed=2)
    kv = make(*tokens, dim, dtype=dtype, seed=1)
    return pool, kv, weight, angles_of(tokens, shape), table, positions_of(*tokens), EPS, PAGE_SIZE


def both(tokens, shape, dtype=BF16, make=integers, **options) -> tuple:
    """Arguments of qkv_norm_rope_append."""
    pool, *others = window_rows(tokens, shape, dtype, make, **options)
    return pool, heads(tokens, shape, dtype, make)[0], *others


# ---- q_norm_rope ----


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("shape", [*SHAPES, *PLAIN_SHAPES])
def test_q_norm_rope_has_the_bits_of_the_reference(shape, dtype, tokens):
    check_kernel("q_norm_rope", heads(tokens, shape, dtype))


# More than 4096 heads: four to a warp. Five heads of a token leave a warp with one.
@pytest.mark.parametrize(("tokens", "shape"), [((130, 1), PRO), ((70, 1), (64, 512, 64)), ((10, 100), (5, 80, 16))])
def test_many_heads_have_the_bits_of_the_reference(tokens, shape):
    check_kernel("q_norm_rope", heads(tokens, shape))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_q_norm_rope_of_other_numbers(dtype):
    check_kernel("q_norm_rope", heads((3, 2), (5, 512, 64), dtype, normal), ROUNDED[dtype])


def test_q_norm_rope_keeps_what_is_not_finite():
    q, *others = heads((2, 3), (6, 512, 64))
    q[0, 0, 0] = 0
    q[0, 0, 1, 3], q[0, 0, 2, 510], q[0, 0, 3, 7] = torch.nan, torch.inf, -torch.inf
    q[0, 0, 4] = torch.finfo(BF16).max
    q[0, 0, 5] = 2.0**-130
    check_kernel("q_norm_rope", (q, *others), bits)


def test_q_norm_rope_takes_strided_heads():
    q, *others = heads((3, 2), (5, 512, 64))
    check_kernel("q_norm_rope", (row_strided(q), *others))


def test_heads_do_not_depend_on_the_batch():
    """130 tokens are four heads to a warp, one is one."""
    assert_rows_independent("q_norm_rope", heads((130, 1), (64, 512, 64), make=normal), (0, 2), rows=(0, 1, 77, 129))


# ---- kv_norm_rope_append ----


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("weight_dtype", [BF16, F32])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_entries_have_the_bits_of_the_reference(shape, dtype, weight_dtype, tokens):
    check_kernel("kv_norm_rope_append", window_rows(tokens, shape, dtype, weight_dtype=weight_dtype))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("shape", PLAIN_SHAPES)
def test_plain_entries_have_the_bits_of_the_reference(shape, dtype, tokens):
    check_kernel("kv_norm_rope_append", window_rows(tokens, shape, dtype, plain=True))


@pytest.mark.sanitize
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_kv_norm_rope_append_of_other_numbers(dtype, plain):
    judge = ROUNDED[dtype] if plain else ALMOST
    check_kernel("kv_norm_rope_append", window_rows((3, 7), PRO, dtype, normal, plain=plain), judge)


def test_a_chunk_of_thousands_of_tokens():
    check_kernel("kv_norm_rope_append", window_rows((2, 2100), PRO))


def same_entries(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """All entries of two packed pools for D = 512, read back: a NaN may have any bits."""
    data, scales = pages.kv_entry_bytes(512, 64)
    read = []
    for pool in (actual, expected):
        pool = pool.view(-1, PAGE_SIZE * (data + scales) + 8)
        table = torch.arange(len(pool), dtype=torch.int32)[:, None]
        entries = torch.arange(PAGE_SIZE).expand(len(pool), -1)
        read.append(pages.read_kv(pool, table, entries, PAGE_SIZE, 512, 64))
    bits(*read)


def test_kv_that_is_not_finite_stays_so():
    pool, kv, *others = window_rows((1, 6), PRO)
    kv[0, 0], kv[0, 1, 5], kv[0, 2, 510] = 0, torch.inf, torch.nan
    kv[0, 3], kv[0, 4] = torch.finfo(BF16).max, 2.0**-130
    check_kernel("kv_norm_rope_append", (pool, kv, *others), same_entries)


@pytest.mark.parametrize("plain", [False, True])
def test_rows_without_a_token_write_nothing(plain):
    pool, q, kv, *others = on_cuda(both((3, 2), PRO, plain=plain))
    before = pool.clone()
    others[3].fill_(-1)
    OPS.kv_norm_rope_append(pool, kv.fill_(torch.nan), *others)
    OPS.qkv_norm_rope_append(pool, q, kv, *others)
    assert_bits_equal(pool.cpu(), before.cpu())
    assert torch.isfinite(q).all()


def test_inputs_with_padding():
    pool, kv, weight, angles, table, positions, *others = window_rows((3, 2), PRO)
    arguments = (pool, row_strided(kv), weight, angles, row_strided(table, 3), row_strided(positions, 5), *others)
    check_kernel("kv_norm_rope_append", arguments)


# ---- qkv_norm_rope_append ----


@pytest.mark.parametrize("tokens", [*TOKENS, (33, 1)])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("shape", [PRO, (3, 192, 64), (2, 1024, 64)])
def test_qkv_norm_rope_append_has_the_bits_of_the_reference(shape, plain, dtype, tokens):
    check_kernel("qkv_norm_rope_append", both(tokens, shape, dtype, plain=plain))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_qkv_norm_rope_append_of_other_numbers(dtype):
    check_kernel("qkv_norm_rope_append", both((3, 2), (5, 512, 64), dtype, normal), (ALMOST, ROUNDED[dtype]))


def test_heads_are_written_in_place_and_their_padding_is_not():
    pool, q, *others = both((3, 2), (5, 512, 64))
    check_kernel("qkv_norm_rope_append", (pool, row_strided(q), *others))


def test_tokens_do_not_depend_on_the_batch():
    """Sequences one after the other leave what they leave together, where four heads share a warp."""
    pool, q, kv, weight, angles, table, positions, eps, page_size = on_cuda(both((40, 1), PRO, make=normal))
    alone_pool, alone_q = pool.clone(), q.clone()
    OPS.qkv_norm_rope_append(pool, q, kv, weight, angles, table, positions, eps, page_size)
    for row in range(40):
        one = slice(row, row + 1)
        OPS.qkv_norm_rope_append(
            alone_pool, alone_q[one], kv[one], weight, angles, table[one], positions[one], eps, page_size
        )
    assert_bits_equal(alone_q.cpu(), q.cpu())
    assert_bits_equal(alone_pool.cpu(), pool.cpu())


def test_offsets_above_two_to_the_31():
    """The second page of a pool and the second head lie further than 32 bits reach."""
    pool, q, kv, weight, angles, table, positions, eps, page_size = on_cuda(both((2, 1), (1, 512, 64)))
    table.copy_(torch.tensor([[0], [1]]))
    positions.fill_(5)
    far = 2**31 + 512
    far_pool = torch.empty(far + pool.shape[1], dtype=torch.uint8, device="cuda").as_strided(
        (2, pool.shape[1]), (far, 1)
    )
    far_q = torch.empty(far + 512, dtype=BF16, device="cuda").as_strided(q.shape, (far, far, far, 1))
    far_pool.copy_(pool[:2])
    far_q.copy_(q)
    OPS.qkv_norm_rope_append(far_pool, far_q, kv, weight, angles, table, positions, eps, page_size)
    OPS.qkv_norm_rope_append(pool, q, kv, weight, angles, table, positions, eps, page_size)
    assert_bits_equal(far_q.cpu(), q.cpu())
    assert_bits_equal(far_pool.cpu(), pool[:2].cpu())


# ---- what is refused ----

WRONG = {
    "heads that overlap": ("q", lambda q: q[:1, :1, :1].expand(2, 3, 4, -1), "q must be heads that do not overlap"),
    "an odd width": ("q", lambda q: q[..., :100], r"kv must be \[2, 3, 100\]"),
    "heads in another order": ("q", lambda q: q.transpose(1, 2).contiguous().transpose(1, 2), "rows at one distance"),
    "heads that start anywhere": ("q", lambda q: row_strided(q, 4), "multiples of 16 bytes"),
    "kv of another dtype": ("kv", lambda kv: kv.float(), r"kv must be \[2, 3, 512\] bfloat16"),
    "another norm": ("weight", lambda weight: weight[:-8], r"weight must be \[512\]"),
    "an odd table": ("rope_table", lambda table: table[:, :63].contiguous(), "R even"),
    "a table that is too wide": ("rope_table", lambda table: table.repeat(1, 5), "R even and at most 256"),
    "nope in parts of groups": ("rope_table", lambda table: table[:, :32].contiguous(), "32 . a multiple of 64"),
    "another batch": ("block_table", lambda table: table[:1], r"block_table must be \[2, \*\] int32"),
    "a ring that is too short": ("page_size", lambda size: 2, r"kv must be \[B, S <= 2, D\], no more rows"),
    "a page without entries": ("page_size", lambda size: 0, "page_size of at least 1"),
    "pages that are too small": ("pool", lambda pool: pool[:, :2000], "page stride >= 2336"),
    "pages that start anywhere": ("pool", lambda pool: row_strided(pool, 3), "multiples of 8 bytes"),
}


@pytest.mark.parametrize(("name", "change", "message"), WRONG.values(), ids=WRONG)
def test_refuses_by_name(name, change, message):
    names = ("pool", "q", "kv", "weight", "rope_table", "block_table", "positions", "eps", "page_size")
    arguments = dict(zip(names, both((2, 3), (4, 512, 64)), strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=f"dsv4::qkv_norm_rope_append: .*{message}"):
        OPS.qkv_norm_rope_append(*on_cuda(tuple(arguments.values())))
