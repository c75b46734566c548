"""The indexer's exact top-k against Python's sort, on inputs that break approximate or unstable selections."""

import math
import random

import pytest
import torch

import dsv4_ops.ops  # noqa: F401  registers the ops
from graph_tests import checks

OPS = torch.ops.dsv4
DIM, PAGE_SIZE, RATIO = 32, 4, 4
FORMS = ("plain", "fp8", "fp4")
CAPACITY = 44  # not a multiple of any k below but 1, 4 and 44


def arguments_for(scores, positions, ratio=RATIO):
    """Plain arguments that make exactly `scores` [C]: head 0 gives its positive part, head 1 minus the negative one."""
    capacity = len(scores)
    keys = torch.zeros(capacity, DIM)
    keys[:, 0] = torch.tensor(scores)
    q = torch.zeros(1, len(positions), 2, DIM)
    q[..., 0, 0], q[..., 1, 0] = 1.0, -1.0
    w = torch.tensor([1.0, -1.0]).expand(1, len(positions), 2).contiguous()
    order = list(range(capacity // PAGE_SIZE))
    random.Random(1).shuffle(order)
    pool = torch.full((len(order), PAGE_SIZE * DIM), math.nan)
    pool[order] = keys.view(-1, PAGE_SIZE * DIM)
    block_table = torch.tensor([order], dtype=torch.int32)
    return q, w, pool, block_table, torch.tensor([positions], dtype=torch.int32), ratio, PAGE_SIZE


def sorted_by_python(scores, visible, k):
    best = sorted(range(visible), key=lambda entry: (-scores[entry], entry))[:k]
    return sorted(best) + [-1] * (k - len(best))


def noise(seed, levels):
    choose = random.Random(seed)
    return [float(choose.randrange(levels)) - levels // 2 for _ in range(CAPACITY)]


SCORES = {
    "all equal": [1.0] * CAPACITY,
    "all zero": [0.0] * CAPACITY,
    "signed zeros": [(-1.0) ** entry * 0.0 for entry in range(CAPACITY)],
    "all minus infinity but one": [-math.inf] * 17 + [-3.0] + [-math.inf] * (CAPACITY - 18),
    "one plus infinity": [float(entry) for entry in range(30)] + [math.inf] + [0.0] * (CAPACITY - 31),
    "winners adjacent": [0.0] * 13 + [5.0] * 9 + [0.0] * (CAPACITY - 22),
    "winners at the end": [0.0] * (CAPACITY - 9) + [5.0] * 9,
    "rising": [float(entry) for entry in range(CAPACITY)],
    "falling": [float(-entry) for entry in range(CAPACITY)],
    "all negative": [-1.0 - entry % 7 for entry in range(CAPACITY)],
    "neighbouring floats": [1.0 + (entry * 7 % CAPACITY) * 2.0**-23 for entry in range(CAPACITY)],
    "subnormal": [(entry * 5 % CAPACITY) * 2.0**-149 for entry in range(CAPACITY)],
    "ties across the boundary": [2.0] * 3 + [1.0] * (CAPACITY - 6) + [2.0] * 3,
    "few levels": noise(0, 3),
    "many levels": noise(1, 1000),
}
POSITIONS = [-1, 0, RATIO - 2, RATIO - 1, RATIO, 2 * RATIO - 1, 33, 70, 71, 72, CAPACITY * RATIO - 1]


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("k", (1, 4, 5, 7, 9, 16, 33, CAPACITY - 1, CAPACITY, CAPACITY + 1, 64))
def test_topk_is_pythons_sort(scores, k):
    """At every number of visible entries from none to all, k above and below it."""
    arguments = arguments_for(scores, POSITIONS)
    made = OPS.index_scores_plain(*arguments)
    picks = OPS.index_topk_plain(*arguments, k)
    for s, position in enumerate(POSITIONS):
        visible = (position + 1) // RATIO
        assert made[0, s, :visible].tolist() == scores[:visible], "the construction gives the scores it promises"
        assert picks[0, s].tolist() == sorted_by_python(scores, visible, k), f"position {position}"


@pytest.mark.parametrize("ratio", (1, 2, 3, 4, 128))
def test_an_entry_is_visible_from_its_last_token_on(ratio):
    positions = [w * ratio + offset for w in (1, 2, 9) for offset in (-2, -1, 0)]
    picks = OPS.index_topk_plain(*arguments_for([1.0] * CAPACITY, positions, ratio), CAPACITY)
    for s, position in enumerate(positions):
        complete = [w for w in range(CAPACITY) if w * ratio + ratio - 1 <= position]
        assert picks[0, s].tolist() == complete + [-1] * (CAPACITY - len(complete))


@pytest.mark.parametrize("k", (512, 500))
def test_topk_of_many_ties_in_a_large_table(k):
    choose = random.Random(2)
    scores = [float(choose.choice((0, 0, 0, 1, 2, 3))) for _ in range(4096)]
    for position in (4096 * RATIO - 1, 3001 * RATIO, 511 * RATIO):
        picks = OPS.index_topk_plain(*arguments_for(scores, [position]), k)
        assert picks[0, 0].tolist() == sorted_by_python(scores, (position + 1) // RATIO, k)


def random_arguments(form, batch, rows, layout=lambda tensor: tensor, heads=3, max_pages=3):
    """Everything random, FP8 and FP4 codes included; positions from -1 to the capacity."""
    torch.manual_seed(0)
    count, dim = batch * max_pages + 1, DIM
    if form == "plain":
        q, pool = (torch.randn(batch, rows, heads, dim),), torch.randn(count, PAGE_SIZE * dim + 4)
    elif form == "fp8":
        q = (torch.randn(batch, rows, heads, dim).to(torch.float8_e4m3fn),)
        pool = torch.randint(0, 127, (count, PAGE_SIZE * (dim + 4) + 4), dtype=torch.uint8)
        pool[:, PAGE_SIZE * dim : -4] = torch.rand(count, PAGE_SIZE).view(torch.uint8)
    else:
        q = tuple(
            torch.randint(low, high, (batch, rows, heads, size), dtype=torch.uint8)
            for low, high, size in ((0, 256, dim // 2), (120, 130, dim // 32))
        )
        pool = torch.randint(120, 130, (count, PAGE_SIZE * (dim // 2 + dim // 32) + 4), dtype=torch.uint8)
    block_table = torch.randperm(count)[: batch * max_pages].view(batch, max_pages).int()
    positions = torch.randint(-1, max_pages * PAGE_SIZE * RATIO, (batch, rows)).int()
    w = torch.randn(batch, rows, heads)
    return (*map(layout, q), layout(w), layout(pool), layout(block_table), layout(positions), RATIO, PAGE_SIZE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", (1, 3, 5, 12, 20))
def test_topk_of_packed_keys_is_the_sort_of_their_scores(form, k):
    """FP4 keys of few levels tie often."""
    arguments = random_arguments(form, 7, 5)
    scores, picks = (
        getattr(OPS, f"index_{name}_{form}")(*arguments, *last) for name, last in (("scores", ()), ("topk", (k,)))
    )
    for b in range(7):
        for s in range(5):
            visible = (int(arguments[-3][b, s]) + 1) // RATIO
            assert picks[b, s].tolist() == sorted_by_python(scores[b, s].tolist(), visible, k)


# ---- contracts of scores and top-k ----


def arguments_of(name, batch, rows, layout=lambda tensor: tensor):
    _, op, form = name.split("_")
    return random_arguments(form, batch, rows, layout) + ((5,) if op == "topk" else ())


NAMES = tuple(f"index_{op}_{form}" for op in ("scores", "topk") for form in FORMS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", (0, 1, 2, 7, 64))
@pytest.mark.parametrize("rows", (0, 1, 4))
def test_op_contract(name, batch, rows):
    for layout in (lambda tensor: tensor, checks.row_strided):
        checks.check_op(name, arguments_of(name, batch, rows, layout))


@pytest.mark.parametrize("name", NAMES)
def test_fake_does_not_specialise_on_the_batch(name):
    checks.check_symbolic_batch(name, lambda batch: arguments_of(name, batch, 4))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    checks.opcheck(name, arguments_of(name, 2, 4))


@pytest.mark.parametrize(
    ("name", "index", "wrong", "message"),
    (
        ("index_scores_plain", 0, torch.zeros(2, 4, 3, DIM, dtype=torch.bfloat16), "q must be"),
        ("index_scores_plain", 1, torch.zeros(2, 4, 3).bfloat16(), "w must be"),
        ("index_scores_fp8", 2, torch.zeros(7, 5, dtype=torch.uint8), "key_pool must be"),
        ("index_scores_fp4", 1, torch.zeros(2, 4, 3, 2, dtype=torch.uint8), "scale must be"),
        ("index_topk_fp4", 4, torch.zeros(2, 3, dtype=torch.int64), "block_table must be"),
        ("index_topk_plain", 4, torch.zeros(2, 4), "positions must be"),
    ),
)
def test_wrong_arguments_are_refused_by_name(name, index, wrong, message):
    arguments = list(arguments_of(name, 2, 4))
    arguments[index] = wrong
    with pytest.raises(ValueError, match=rf"dsv4::{name}: .*{message}"):
        getattr(OPS, name)(*arguments)
