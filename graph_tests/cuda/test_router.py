"""Kernels of the family `router` against their references."""

import pytest
import torch

from graph_tests.checks import assert_bits_equal, row_strided
from graph_tests.cuda.kernel_checks import assert_rows_independent, bits, check_kernel, close

pytestmark = pytest.mark.cuda

OPS = torch.ops.dsv4
F32, BF16 = torch.float32, torch.bfloat16
SCALE = 1.5
FLASH, PRO, ODD = (256, 4096, 6), (384, 7168, 6), (48, 1032, 5)  # experts, d, k
CHOICES = [(1, 1), (5, 2), (8, 8), (48, 5), (256, 6), (384, 16), (1000, 8), (1024, 32)]  # experts, k
MANY = 300  # rows: above the 256 up to which the kernels split by slices and choose with a CTA a row

# A score is sqrt(log1p(exp(logit))): exp and log1p within an ulp each on both devices, halved by the square root.
# Then a sum of at most 32 of them in another order, a quotient, a product: below 16 roundings of 2^-24 on each side.
CHOICE = (bits, close(2e-6))
# Here the logits differ by the order of an fp32 sum, by 1e-5 at most for these operands, and a weight by as much of
# itself, because scores are about 1.
ROUNDED = (bits, close(3e-5))


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def choose(rows: int, k: int) -> torch.Tensor:
    return torch.full((rows, k), -1, dtype=torch.int32)


def clear(logits: torch.Tensor, bias: torch.Tensor, k: int, gap: float) -> torch.Tensor:
    """Which rows have an order of the first k + 1 experts that errors below `gap` cannot change; ties are exact."""
    score = torch.nn.functional.softplus(logits.double()).sqrt()
    key = (score + bias).sort(descending=True).values[:, : k + 1]
    distance = key[:, :-1] - key[:, 1:]
    return ((distance > gap) | (distance == 0)).all(1)


def logits_and_bias(rows: int, experts: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiples of 1/16: many ties."""
    bias = (normal(experts, seed=1) * 4).round() / 4
    logits = (normal(2 * rows + 8, experts, seed=experts) * 64).round() / 16
    logits = logits[clear(logits, bias, k, 1e-6)][:rows]
    assert len(logits) == rows
    return logits, bias


def operands(rows: int, shape: tuple[int, int, int], dtypes=(BF16, BF16), *, exact: bool = False) -> tuple:
    """x, weight, bias of logits of size 4; `exact`: whose sums are exact in fp32 in any order."""
    experts, d, k = shape
    bias = normal(experts, seed=1)
    if exact:
        generator = torch.Generator().manual_seed(rows)
        x = torch.randint(-2, 3, (2 * rows + 8, d), generator=generator).to(dtypes[0])
        weight = (torch.randint(-2, 3, (experts, d), generator=generator) * 2.0**-5).to(dtypes[1])
    else:
        x = normal(2 * rows + 8, d, seed=2).to(dtypes[0])
        weight = (normal(experts, d, seed=3) * 4 * d**-0.5).to(dtypes[1])
    x = x[clear(x.float() @ weight.float().T, bias, k, 1e-4)][:rows]
    assert len(x) == rows
    return x, weight, bias


# ---- gate_topk ----


@pytest.mark.parametrize("rows", [0, 3, MANY, pytest.param(2, marks=pytest.mark.sanitize)])
@pytest.mark.parametrize(("experts", "k"), CHOICES)
def test_gate_topk_is_the_reference(experts, k, rows):
    logits, bias = logits_and_bias(rows, experts, k)
    check_kernel("gate_topk", (logits, bias, choose(rows, k), k, SCALE), CHOICE)


def test_gate_topk_of_a_prefill():
    logits, bias = logits_and_bias(4096, 256, 6)
    check_kernel("gate_topk", (logits, bias, choose(4096, 6), 6, SCALE), CHOICE)


@pytest.mark.parametrize("rows", [4, MANY])
@pytest.mark.parametrize(("experts", "k"), CHOICES)
def test_gate_topk_breaks_ties_by_the_lowest_id(experts, k, rows):
    """Also ties of NaN, which comes first, and of infinities."""
    logits = torch.zeros(rows, experts)
    logits[1, experts // 2 :] = float("nan")
    logits[2, experts // 3 :] = float("inf")
    logits[3, : experts // 2] = float("-inf")
    check_kernel("gate_topk", (logits, torch.zeros(experts), choose(rows, k), k, SCALE), CHOICE)


def test_gate_topk_orders_scores_that_underflow():
    """softplus(-100) is a subnormal number, its root is not; softplus(-110) is 0."""
    logits = torch.tensor([[-110.0, -100.0, -95.0, -90.0, -120.0, -115.0]])
    check_kernel("gate_topk", (logits, torch.zeros(6), choose(1, 5), 5, SCALE), (bits, close(0.3, 1e-6)))


@pytest.mark.parametrize("rows", [5, MANY])
def test_gate_topk_fixes_slots(rows):
    """Single slots, whole rows (which skip the choice), an expert twice."""
    logits, bias = logits_and_bias(rows, 256, 6)
    fixed = choose(rows, 6)
    fixed[0] = torch.tensor([255, 0, 7, 7, 31, 32])
    fixed[1, 3] = 200
    fixed[2::2] = torch.randint(256, fixed[2::2].shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    check_kernel("gate_topk", (logits, bias, fixed, 6, SCALE), CHOICE)


def test_gate_topk_reads_nothing_for_an_id_that_does_not_exist():
    """The reference refuses such an id; on the GPU it is passed on and the row's weights are NaN."""
    fixed = torch.tensor([[8, 1], [3, 1]], dtype=torch.int32, device="cuda")
    ids, weights = OPS.gate_topk(torch.zeros(2, 8, device="cuda"), torch.zeros(8, device="cuda"), fixed, 2, 1.0)
    assert ids.tolist() == [[8, 1], [3, 1]]
    assert weights[0].isnan().all() and weights[1].tolist() == [0.5, 0.5]


def test_gate_topk_takes_strided_rows_and_more_dimensions():
    logits, bias = logits_and_bias(6, 256, 6)
    check_kernel("gate_topk", (row_strided(logits), bias, row_strided(choose(6, 6)), 6, SCALE), CHOICE)
    check_kernel("gate_topk", (logits.view(2, 3, 256), bias, choose(6, 6).view(2, 3, 6), 6, SCALE), CHOICE)


def test_gate_topk_rows_do_not_depend_on_the_batch():
    logits, bias = logits_and_bias(MANY, 384, 6)
    arguments = (logits, bias, choose(MANY, 6), 6, SCALE)
    assert_rows_independent("gate_topk", arguments, batched=(0, 2), rows=(0, 1, 77, MANY - 1))


# ---- gate ----


@pytest.mark.parametrize("rows", [0, 1, 3, 16, 130, MANY])
@pytest.mark.parametrize("shape", [FLASH, PRO, ODD])
def test_gate_of_exact_sums_is_the_reference(shape, rows):
    k = shape[-1]
    check_kernel("gate", (*operands(rows, shape, exact=True), choose(rows, k), k, SCALE), CHOICE)


@pytest.mark.parametrize("rows", [3, MANY])
@pytest.mark.parametrize("dtypes", [(BF16, F32), (F32, BF16), (F32, F32)])
def test_gate_of_fp32_operands_is_the_reference(dtypes, rows):
    check_kernel("gate", (*operands(rows, ODD, dtypes, exact=True), choose(rows, 5), 5, SCALE), CHOICE)


@pytest.mark.sanitize
@pytest.mark.parametrize("rows", [2, 70, 260])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, F32)])
def test_gate_at_the_edges_of_tiles(dtypes, rows):
    """d, experts and rows fill no tile."""
    check_kernel("gate", (*operands(rows, (5, 72, 2), dtypes, exact=True), choose(rows, 2), 2, SCALE), CHOICE)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, F32), (F32, BF16), (F32, F32)])
@pytest.mark.parametrize("shape", [FLASH, PRO])
def test_gate_of_random_operands(shape, dtypes):
    k = shape[-1]
    check_kernel("gate", (*operands(20, shape, dtypes), choose(20, k), k, SCALE), ROUNDED)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, F32)])
@pytest.mark.parametrize("shape", [FLASH, PRO])
def test_gate_rows_do_not_depend_on_the_batch(shape, dtypes):
    """1, 130 and 300 rows take three ways through the product: the same bits of sums that are not exact."""
    k = shape[-1]
    for rows in (130, MANY):
        arguments = (*operands(rows, shape, dtypes), choose(rows, k), k, SCALE)
        assert_rows_independent("gate", arguments, batched=(0, 3), rows=(0, 1, 77, rows - 1))


def test_gate_is_gate_topk_of_the_product():
    x, weight, bias = operands(40, FLASH, exact=True)
    logits = x.float() @ weight.float().T
    expected = OPS.gate_topk(logits.cuda(), bias.cuda(), choose(40, 6).cuda(), 6, SCALE)
    actual = OPS.gate(x.cuda(), weight.cuda(), bias.cuda(), choose(40, 6).cuda(), 6, SCALE)
    for one, other in zip(actual, expected, strict=True):
        assert_bits_equal(one.cpu(), other.cpu())


def test_gate_fixes_slots():
    arguments = operands(33, FLASH, exact=True)
    fixed = torch.randint(-1, 256, (33, 6), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    fixed[0] = -1
    fixed[1] = torch.arange(6)
    check_kernel("gate", (*arguments, fixed, 6, SCALE), CHOICE)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_gate_keeps_non_finite_rows_to_themselves(dtype):
    x, weight, bias = operands(9, ODD, (dtype, dtype), exact=True)
    x[2, 5], x[4, 0], x[4, 1] = float("nan"), float("inf"), float("-inf")
    check_kernel("gate", (x, weight, bias, choose(9, 5), 5, SCALE), CHOICE)


def test_gate_takes_strided_rows_and_more_dimensions():
    x, weight, bias = operands(6, ODD, exact=True)
    strided = (row_strided(x), row_strided(weight), bias, row_strided(choose(6, 5)), 5, SCALE)
    check_kernel("gate", strided, CHOICE)
    check_kernel("gate", (x.view(2, 3, -1), weight, bias, choose(6, 5).view(2, 3, 5), 5, SCALE), CHOICE)


# ---- what the kernels refuse ----


def cuda_arguments(experts: int = 8, d: int = 64, k: int = 2) -> list:
    x, weight = torch.zeros(3, d, dtype=BF16), torch.zeros(experts, d, dtype=BF16)
    return [x.cuda(), weight.cuda(), torch.zeros(experts).cuda(), choose(3, k).cuda(), k, SCALE]


def out(k: int, rows: int = 3) -> dict:
    return {"ids": choose(rows, k).cuda(), "weights": torch.zeros(rows, k).cuda()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d": 60}, r"dsv4::gate: x must be rows that start at multiples of 16 bytes"),
        ({"experts": 1032}, r"dsv4::gate: weight must be \[E, d\] with 1 <= E <= 1024"),
        ({"experts": 64, "k": 33}, r"k <= 32"),
    ],
)
def test_gate_names_shapes_that_it_cannot_take(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.gate(*cuda_arguments(**arguments))


def test_gate_out_checks_workspace_and_outputs():
    arguments = cuda_arguments()
    with pytest.raises(RuntimeError, match=r"dsv4::gate: workspace must be given, with at least 24 float32"):
        OPS.gate.out(*arguments, **out(2))
    with pytest.raises(RuntimeError, match=r"dsv4::gate: workspace must be given, with at least 24 float32"):
        OPS.gate.out(*arguments, **out(2), workspace=torch.zeros(23).cuda())
    with pytest.raises(RuntimeError, match=r"dsv4::gate: ids must be contiguous \[3, 2\] int32"):
        OPS.gate.out(*arguments, **(out(2) | {"ids": choose(3, 3).cuda()}), workspace=torch.zeros(24).cuda())
    fewer = arguments[:3] + [choose(2, 2).cuda()] + arguments[4:]
    with pytest.raises(RuntimeError, match=r"dsv4::gate: fixed_ids must be \[T, k\] with one slot for each"):
        OPS.gate.out(*fewer, **out(2), workspace=torch.zeros(24).cuda())
    on_cpu = [*arguments[:2], arguments[2].cpu(), *arguments[3:]]
    with pytest.raises(RuntimeError, match=r"dsv4::gate: bias must be on cuda:0"):
        OPS.gate.out(*on_cpu, **out(2), workspace=torch.zeros(24).cuda())


def test_gate_topk_out_checks_logits():
    with pytest.raises(RuntimeError, match=r"dsv4::gate_topk: logits must be \[T, E\] with 1 <= E <= 1024"):
        OPS.gate_topk(torch.zeros(1, 1025).cuda(), torch.zeros(1025).cuda(), choose(1, 2).cuda(), 2, SCALE)
    bf16 = torch.zeros(1, 8, dtype=BF16).cuda()
    with pytest.raises(RuntimeError, match=r"dsv4::gate_topk: logits must be \[..., \*\] float32"):
        OPS.gate_topk.out(bf16, torch.zeros(8).cuda(), choose(1, 2).cuda(), 2, SCALE, **out(2, 1))
