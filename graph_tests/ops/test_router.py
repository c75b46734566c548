"""Router against transformers (fp32), and its second half alone, gate_topk."""

import pytest
import torch
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter, DeepseekV4TopKRouter

import dsv4_ops.ops  # noqa: F401  registers the ops
from graph_tests import checks
from graph_tests.ops.moe_cases import BF16, EXPERTS, F32, HIDDEN, SCALE, K, config, normal

OPS = torch.ops.dsv4


def choose(rows: int, k: int = K) -> torch.Tensor:
    """No slot is fixed: the router chooses all k."""
    return torch.full((rows, k), -1, dtype=torch.int32)


def dense_weights(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(ids), EXPERTS).scatter_add(1, ids.long(), weights)


def arguments(name: str, rows: int, dtype: torch.dtype = F32) -> tuple:
    """Arguments of an op of the family; every second row has its first slot fixed."""
    fixed = choose(rows)
    fixed[1::2, 0] = 7
    x, weight = normal(rows, HIDDEN, dtype=dtype), normal(EXPERTS, HIDDEN, seed=1, dtype=dtype)
    scores = (x, weight) if name == "gate" else (normal(rows, EXPERTS),)
    return *scores, normal(EXPERTS, seed=2), fixed, K, SCALE


def test_gate_equals_transformers_top_k_router():
    router, x = DeepseekV4TopKRouter(config()), normal(40, HIDDEN)
    weight, bias = normal(EXPERTS, HIDDEN, seed=1) * HIDDEN**-0.5, normal(EXPERTS, seed=2)
    router.weight.data, router.e_score_correction_bias = weight, bias
    ids, weights = OPS.gate(x, weight, bias, choose(40), K, SCALE)
    _, expected_weights, expected_ids = router(x)
    # the same fp32 operations; only the order of two addends may differ
    torch.testing.assert_close(
        dense_weights(ids, weights), dense_weights(expected_ids, expected_weights).detach(), rtol=1e-6, atol=0
    )


def test_gate_with_fixed_ids_equals_transformers_hash_router():
    router, x = DeepseekV4HashRouter(config()), normal(40, HIDDEN)
    router.weight.data = normal(EXPERTS, HIDDEN, seed=1) * HIDDEN**-0.5
    router.tid2eid.copy_(torch.randint(EXPERTS, (50, K), generator=torch.Generator().manual_seed(3)))
    tokens = torch.randint(50, (40,), generator=torch.Generator().manual_seed(4))
    fixed = router.tid2eid[tokens].int()
    ids, weights = OPS.gate(x, router.weight.data, normal(EXPERTS, seed=2), fixed, K, SCALE)
    _, expected, _ = router(x, tokens)
    assert torch.equal(ids, fixed)
    torch.testing.assert_close(weights, expected.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_gate_orders_by_biased_score_and_weighs_by_score(dtype):
    x, weight, bias = normal(30, HIDDEN, dtype=dtype), normal(64, HIDDEN, seed=1, dtype=dtype) / 8, normal(64, seed=2)
    ids, weights = OPS.gate(x, weight, bias, choose(30, 6), 6, SCALE)
    score = (1 + (x.double() @ weight.double().T).exp()).log().sqrt()
    value, order = (score + bias).sort(descending=True)
    assert (value[:, :6] - value[:, 1:7]).min() > 1e-6  # fp32 cannot change the order of these inputs
    assert torch.equal(ids, order[:, :6].int())
    chosen = score.gather(1, order[:, :6])
    # a dot product of 64 fp32 terms of size 1/8: about 1e-6
    torch.testing.assert_close(weights.double(), chosen / chosen.sum(1, keepdim=True) * SCALE, rtol=1e-5, atol=0)


def test_gate_breaks_ties_by_the_lowest_id():
    """Zero logits: every score is sqrt(log 2), so the bias alone decides; equal biases leave the order of the ids."""
    bias = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 2.0, 0.0, 1.0])
    ids, weights = OPS.gate(torch.zeros(3, HIDDEN), normal(EXPERTS, HIDDEN), bias, choose(3, 6), 6, SCALE)
    assert ids.tolist() == [[3, 5, 1, 4, 7, 0]] * 3
    torch.testing.assert_close(weights, torch.full((3, 6), SCALE / 6), rtol=1e-6, atol=0)


def test_gate_fixes_single_slots():
    """A slot at -1 keeps the expert that the router chose for it; the sum runs over what is then chosen."""
    bias = torch.arange(8.0, 0.0, -1.0)
    fixed = torch.tensor([[-1, 7], [5, -1], [-1, -1]], dtype=torch.int32)
    ids, weights = OPS.gate(torch.zeros(3, HIDDEN), normal(EXPERTS, HIDDEN), bias, fixed, K, SCALE)
    assert ids.tolist() == [[0, 7], [5, 1], [0, 1]]
    torch.testing.assert_close(weights, torch.full((3, K), SCALE / K), rtol=1e-6, atol=0)


# ---- gate_topk ----


def test_gate_is_gate_topk_of_the_fp32_product():
    x, weight, *rest = arguments("gate", 20, BF16)
    logits = torch.nn.functional.linear(x.float(), weight.float())
    for fused, halves in zip(OPS.gate(x, weight, *rest), OPS.gate_topk(logits, *rest), strict=True):
        checks.assert_bits_equal(fused, halves)


def test_nan_is_chosen_first_then_infinity():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[0.0, nan, 1.0, inf, nan, -inf]])
    ids, _ = OPS.gate_topk(logits, torch.zeros(6), choose(1, 5), 5, SCALE)
    assert ids.tolist() == [[1, 4, 3, 2, 0]]


# ---- contracts ----

NAMES = ("gate", "gate_topk")


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 64])
@pytest.mark.parametrize(("name", "dtype"), [("gate", BF16), ("gate", F32), ("gate_topk", F32)])
def test_contract(name, dtype, rows):
    given = arguments(name, rows, dtype)
    strided = tuple(checks.row_strided(a) if isinstance(a, torch.Tensor) and a.dim() > 1 else a for a in given)
    for layout in (given, strided):
        checks.check_op(name, layout)
    (ids, weights), (expected_ids, expected_weights) = (getattr(OPS, name)(*layout) for layout in (strided, given))
    assert torch.equal(ids, expected_ids)
    # torch computes softplus of strided logits in another loop: an ulp
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_no_guard_on_the_batch(name):
    checks.check_symbolic_batch(name, lambda batch: arguments(name, batch))
    checks.opcheck(name, arguments(name, 3))


def test_wrong_arguments_are_named():
    logits, bias, fixed, k, scale = arguments("gate_topk", 2)
    with pytest.raises(ValueError, match="dsv4::gate_topk: logits must be \\[T, E\\] float32"):
        OPS.gate_topk(logits.bfloat16(), bias, fixed, k, scale)
    with pytest.raises(ValueError, match="bias must be \\[8\\] float32"):
        OPS.gate_topk(logits, bias[:7], fixed, k, scale)
    with pytest.raises(ValueError, match="fixed_ids must be \\[T, 2\\] int32 for logits"):
        OPS.gate_topk(logits, bias, fixed.long(), k, scale)
    x, weight, bias, fixed, k, scale = arguments("gate", 2)
    with pytest.raises(ValueError, match="dsv4::gate: bias must be \\[8\\] float32"):
        OPS.gate(x, weight, bias[:7], fixed, k, scale)
    with pytest.raises(ValueError, match="k must be between 1 and"):
        OPS.gate(x, weight, bias, choose(2, 9), 9, scale)
