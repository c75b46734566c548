"""Index queries against compositions by hand."""

import pytest
import torch

import dsv4_ops.ops  # noqa: F401  registers the ops
from dsv4_ops.ops.rope import rope_table
from graph_tests import checks
from graph_tests.ops.by_hand import fp4_by_hand, hadamard_by_hand, rope_by_hand

OPS = torch.ops.dsv4
DIM, ROPE_DIM = 64, 32
FORMS = ("plain", "fp8", "fp4")


def table():
    return rope_table(ROPE_DIM, 1024, 1.6e5)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_plain_query_is_roped_and_its_weight_scaled():
    q, weights, positions = random(2, 3, 4, DIM), random(2, 3, 4, seed=1), torch.tensor([[0, 1, 900], [7, 8, -1]])
    y, w = OPS.index_query_plain(q, weights, table(), positions.int())
    checks.assert_bits_equal(w, weights * torch.tensor(DIM**-0.5 * 4**-0.5))
    for b, s in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        for h in range(4):
            expected = rope_by_hand(q[b, s, h].double(), table()[positions[b, s]])
            assert checks.relative_error(y[b, s, h], expected) < 2e-7  # two products and a sum in fp32


def rotated_query_by_hand(q, rope_row):
    """RoPE, then Hadamard, each rounded to bf16."""
    return hadamard_by_hand(rope_by_hand(q.double(), rope_row).bfloat16())


@pytest.mark.parametrize("form", ("fp8", "fp4"))
def test_packed_queries_are_byte_equal_to_their_composition(form):
    q = random(2, 2, 3, DIM, seed=2, dtype=torch.bfloat16)
    weights, positions = random(2, 2, 3, seed=1, dtype=torch.bfloat16), torch.tensor([[5, 6], [900, 901]])
    *codes, w = getattr(OPS, f"index_query_{form}")(q, weights, table(), positions.int())
    constant = torch.tensor(DIM**-0.5 * 3**-0.5)
    for b, s, h in ((b, s, h) for b in range(2) for s in range(2) for h in range(3)):
        rotated = rotated_query_by_hand(q[b, s, h], table()[positions[b, s]])
        weight = weights[b, s, h].float() * constant
        if form == "fp8":
            scale = rotated.float().abs().max().clamp_min(1e-4) / 448
            checks.assert_bits_equal(codes[0][b, s, h], (rotated.float() / scale).to(torch.float8_e4m3fn))
            assert w[b, s, h].item() == (weight * scale).item()
        else:
            expected_codes, expected_scale = fp4_by_hand(rotated)
            assert codes[0][b, s, h].tolist() == expected_codes.tolist()
            assert codes[1][b, s, h].tolist() == expected_scale.tolist()
            assert w[b, s, h].item() == weight.item()


# ---- contracts ----


def arguments(batch, rows, dtype=torch.float32, layout=lambda tensor: tensor):
    q, weights = random(batch, rows, 3, DIM, dtype=dtype), random(batch, rows, 3, seed=1, dtype=dtype)
    positions = torch.arange(-1, batch * rows - 1).view(batch, rows).int()
    return tuple(map(layout, (q, weights, table(), positions)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", (0, 1, 2, 7, 64))
@pytest.mark.parametrize("rows", (0, 1, 4))
def test_op_contract(form, batch, rows):
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (lambda tensor: tensor, checks.row_strided):
            checks.check_op(f"index_query_{form}", arguments(batch, rows, dtype, layout))


@pytest.mark.parametrize("form", FORMS)
def test_no_guard_on_the_batch(form):
    checks.check_symbolic_batch(f"index_query_{form}", lambda batch: arguments(batch, 4))
    checks.opcheck(f"index_query_{form}", arguments(2, 4))


@pytest.mark.parametrize(
    ("form", "index", "wrong", "message"),
    (
        ("plain", 0, torch.zeros(2, 4, DIM), "q must be"),
        ("fp8", 0, torch.zeros(2, 4, 3, 96), "Di must be a power of two"),
        ("fp8", 1, torch.zeros(2, 4, 5), "weights must be"),
        ("fp4", 2, torch.zeros(64, DIM + 2), "rope_table must be"),
        ("fp4", 3, torch.zeros(2, 4, dtype=torch.int64), "positions must be"),
    ),
)
def test_wrong_arguments_are_refused_by_name(form, index, wrong, message):
    given = list(arguments(2, 4))
    given[index] = wrong
    with pytest.raises(ValueError, match=rf"dsv4::index_query_{form}: .*{message}"):
        getattr(OPS, f"index_query_{form}")(*given)
