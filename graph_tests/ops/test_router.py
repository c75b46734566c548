"""gate_topk, the second half of the router; what both halves together compute is tested in test_moe.py."""

import pytest
import torch

from graph_tests import checks

OPS = torch.ops.dsv4
EXPERTS, K, SCALE = 8, 3, 1.5


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments(rows: int) -> tuple:
    fixed = torch.full((rows, K), -1, dtype=torch.int32)
    fixed[1::2, 0] = 7
    return normal(rows, EXPERTS), normal(EXPERTS, seed=1), fixed, K, SCALE


def test_gate_is_gate_topk_of_the_fp32_product():
    x, weight = normal(20, 64).bfloat16(), normal(EXPERTS, 64, seed=2).bfloat16()
    _, *rest = arguments(20)
    logits = torch.nn.functional.linear(x.float(), weight.float())
    for fused, halves in zip(OPS.gate(x, weight, *rest), OPS.gate_topk(logits, *rest), strict=True):
        checks.assert_bits_equal(fused, halves)


def test_nan_is_chosen_first_then_infinity():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[0.0, nan, 1.0, inf, nan, -inf]])
    ids, _ = OPS.gate_topk(logits, torch.zeros(6), torch.full((1, 5), -1, dtype=torch.int32), 5, SCALE)
    assert ids.tolist() == [[1, 4, 3, 2, 0]]


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 64])
def test_contract(rows):
    logits, bias, fixed, *scalars = arguments(rows)
    strided = (checks.row_strided(logits), bias, checks.row_strided(fixed), *scalars)
    for layout in ((logits, bias, fixed, *scalars), strided):
        checks.check_op("gate_topk", layout)


def test_no_guard_on_the_batch():
    checks.check_symbolic_batch("gate_topk", arguments)
    checks.opcheck("gate_topk", arguments(3))


def test_wrong_arguments_are_named():
    logits, bias, fixed, k, scale = arguments(2)
    with pytest.raises(ValueError, match="dsv4::gate_topk: logits must be \\[T, E\\] float32"):
        OPS.gate_topk(logits.bfloat16(), bias, fixed, k, scale)
    with pytest.raises(ValueError, match="bias must be \\[8\\] float32"):
        OPS.gate_topk(logits, bias[:7], fixed, k, scale)
    with pytest.raises(ValueError, match="fixed_ids must be \\[T, 3\\] int32 for logits"):
        OPS.gate_topk(logits, bias, fixed.long(), k, scale)
