"""Router and experts against transformers (fp32), quantised experts against a loop over rows and slots in fp64."""

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Experts,
    DeepseekV4HashRouter,
    DeepseekV4TopKRouter,
)

from dsv4_ops.ops import moe
from graph_tests import checks
from graph_tests.ops import scalar
from graph_tests.ops.operands import E2M1, E4M3, fp8_rows, fp8_weight, mxfp4_weight, nvfp4

OPS = torch.ops.dsv4
F32, BF16 = torch.float32, torch.bfloat16
EXPERTS, K, HIDDEN, WIDTH, LIMIT, SCALE = 8, 2, 64, 96, 2.5, 1.5
FORMATS = ["dense", "fp8", "mxfp4", "nvfp4"]


def config() -> DeepseekV4Config:
    made = DeepseekV4Config(
        vocab_size=50,
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=K,
        num_attention_heads=2,
        routed_scaling_factor=SCALE,
        swiglu_limit=LIMIT,
        num_hidden_layers=2,
    )
    made._experts_implementation = "eager"
    return made


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def choose(rows: int, k: int = K) -> torch.Tensor:
    return torch.full((rows, k), -1, dtype=torch.int32)


def dense_weights(ids: torch.Tensor, weights: torch.Tensor, experts: int = EXPERTS) -> torch.Tensor:
    return torch.zeros(len(ids), experts).scatter_add(1, ids.long(), weights)


# ---- gate ----


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


# ---- experts ----


def quantised(kind: str, rows: int):
    """Arguments of moe_<kind> up to ids, weight tensors, and x [T, d], w1, w3, w2 [E, N, K] in fp64; sums are exact."""
    generator = torch.Generator().manual_seed(5)
    if kind == "nvfp4":
        x, x64 = nvfp4((rows, HIDDEN), generator, True, (rows, 1))
    else:
        x, x64 = fp8_rows((rows, HIDDEN), generator, True, 32)
    tensors, values = [], []
    for n, k in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)):
        if kind == "nvfp4":
            made = [nvfp4((n, k), generator, True, ()) for _ in range(EXPERTS)]
        else:
            made = [(fp8_weight if kind == "fp8" else mxfp4_weight)(n, k, generator, True) for _ in range(EXPERTS)]
        parts = zip(*(packed for packed, _ in made), strict=True)
        tensors += [torch.stack([part.view(torch.uint8) if part.dim() else part for part in some]) for some in parts]
        values.append(torch.stack([value for _, value in made]))
    dtypes = {"fp8": (torch.float8_e4m3fn, None), "mxfp4": (None, None), "nvfp4": (None, torch.float8_e4m3fn, None)}[
        kind
    ]
    tensors = [part.view(dtypes[i % len(dtypes)] or part.dtype) for i, part in enumerate(tensors)]
    return x, tensors, x64, values


def make(kind: str, rows: int, *, dtype: torch.dtype = BF16, ids: torch.Tensor | None = None):
    """Arguments of moe_<kind>, and x, w1, w3, w2 in fp64. g and u reach the limit."""
    if ids is None:
        ids = torch.randint(EXPERTS, (rows, K), generator=torch.Generator().manual_seed(6))
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(7))
    if kind == "dense":
        w1, w3 = (normal(EXPERTS, WIDTH, HIDDEN, seed=seed).div(4).to(dtype) for seed in (1, 2))
        w2, x = normal(EXPERTS, HIDDEN, WIDTH, seed=3).div(4).to(dtype), normal(rows, HIDDEN, dtype=dtype)
        return (x, ids.int(), weights, w1, w3, w2, LIMIT), tuple(a.double() for a in (x, w1, w3, w2))
    x, tensors, x64, values = quantised(kind, rows)
    return (*x, ids.int(), weights, *tensors, LIMIT), (x64, *values)


def requantised(kind: str, h: torch.Tensor) -> torch.Tensor:
    """One row of the activation, quantised number by number, in fp64."""
    row = h.tolist()
    if kind == "dense":
        return h
    if kind == "nvfp4":
        step = scalar.nvfp4_global_scale(row)
        packed, scales = scalar.quant_nvfp4(row, step)
        codes = torch.tensor([code for byte in packed for code in (byte % 16, byte // 16)])
        return E2M1[codes] * E4M3[torch.tensor(scales)].repeat_interleave(16) * step
    codes, scales = scalar.quant_fp8(row, 32)  # WIDTH is a multiple of 32 only
    return E4M3[torch.tensor(codes)] * (2.0 ** (torch.tensor(scales).double() - 127)).repeat_interleave(32)


def judge(kind: str, arguments: tuple, values: tuple, dtype: torch.dtype = BF16) -> torch.Tensor:
    """A loop over rows and slots, with the roundings of the released code."""
    x, w1, w3, w2 = values
    first = {"dense": 1, "fp8": 2, "mxfp4": 2, "nvfp4": 3}[kind]
    ids, weights = arguments[first].tolist(), arguments[first + 1].double()

    def rounded(value: torch.Tensor) -> torch.Tensor:
        return value.to(F32).to(dtype).double()

    y = torch.zeros(len(ids), HIDDEN)
    for t, row in enumerate(ids):
        for slot, expert in enumerate(row):
            if 0 <= expert < EXPERTS:
                g, u = (rounded(w[expert] @ x[t]).clamp_max(LIMIT) for w in (w1, w3))
                h = rounded(g * torch.sigmoid(g) * u.clamp_min(-LIMIT) * weights[t, slot])
                y[t] += rounded(w2[expert] @ requantised(kind, h)).float()
    return y


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = BF16) -> None:
    """fp32 and fp64 round to the same bf16 but for values within 2^-15 of a boundary: here a few at most, each of which
    moves a quantised number by one step. Leaving out the second quantisation would cost 2e-2."""
    assert actual.dtype == F32
    assert checks.relative_error(actual, expected) < (2.0**-8 if dtype == BF16 else 1e-6)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_moe_dense_equals_transformers_experts(rows):
    """fp32; transformers multiplies with the route weight after w2, which is the same but for rounding."""
    (x, ids, weights, w1, w3, w2, limit), _ = make("dense", rows, dtype=F32)
    experts = DeepseekV4Experts(config())
    experts.gate_up_proj.data, experts.down_proj.data = torch.cat((w1, w3), dim=1), w2
    expected = experts(x, ids.long(), weights).detach()
    assert checks.relative_error(OPS.moe_dense(x, ids, weights, w1, w3, w2, limit), expected) < 1e-6


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("kind", FORMATS)
def test_moe_is_a_loop_over_rows_and_slots(kind, rows):
    arguments, values = make(kind, rows)
    assert_near(getattr(OPS, f"moe_{kind}")(*arguments), judge(kind, arguments, values))


def test_moe_dense_in_fp32_is_a_loop_over_rows_and_slots():
    arguments, values = make("dense", 20, dtype=F32)
    assert_near(OPS.moe_dense(*arguments), judge("dense", arguments, values, F32), F32)


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("kind", FORMATS)
def test_ids_out_of_range_contribute_nothing(kind, rows):
    ids = torch.randint(-3, EXPERTS + 3, (rows, K), generator=torch.Generator().manual_seed(8))
    ids[0], ids[1] = torch.tensor([-1, EXPERTS]), torch.tensor([3, EXPERTS + 100])
    arguments, values = make(kind, rows, ids=ids)
    y = getattr(OPS, f"moe_{kind}")(*arguments)
    assert (y[0] == 0).all()
    assert_near(y, judge(kind, arguments, values))


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("kind", FORMATS)
def test_an_expert_may_serve_several_slots_of_a_row(kind, rows):
    arguments, values = make(kind, rows, ids=torch.full((rows, K), 5))
    assert_near(getattr(OPS, f"moe_{kind}")(*arguments), judge(kind, arguments, values))


@pytest.mark.parametrize("kind", FORMATS)
def test_few_rows_and_many_rows_agree(kind):
    """4 rows x 2 slots <= 8 experts: a block for each pair. 20 rows: pairs sorted by expert."""
    arguments, _ = make(kind, 20)
    op, inputs = getattr(OPS, f"moe_{kind}"), {"dense": 3, "fp8": 4, "mxfp4": 4, "nvfp4": 5}[kind]
    many = op(*arguments)
    for start in (0, 4, 16):
        few = op(*(a[start : start + 4] for a in arguments[:inputs]), *arguments[inputs:])
        assert_near(few, many[start : start + 4])


def with_shared(arguments: tuple) -> tuple:
    """The same call with what a shared expert made of its rows."""
    x = arguments[0]
    return (*arguments, normal(*x.shape[:-1], HIDDEN, seed=9, dtype=F32 if x.dtype == F32 else BF16))


@pytest.mark.parametrize("rows", [0, 3, 40])
@pytest.mark.parametrize("kind", FORMATS)
def test_shared_and_routed_are_added_in_fp32_and_rounded_once(kind, rows):
    arguments = with_shared(make(kind, rows)[0])
    op, shared = getattr(OPS, f"moe_{kind}"), arguments[-1]
    checks.assert_bits_equal(op(*arguments), shared.clone().add_(op(*arguments[:-1])))
    checks.assert_bits_equal(op(*arguments[:-1], None), op(*arguments[:-1]))


@pytest.mark.parametrize("size", [1, 4, 16])
def test_sorted_pairs_puts_every_pair_into_a_block_of_its_expert(size):
    for ids in ([5] * 20, [0, 7, -1, 3, 3, 8, 0, 3, 3, 3], [-1, 9], [4], list(range(8)) * 5, []):
        ids = torch.tensor(ids, dtype=torch.long)
        blocks = moe.sorted_pairs(ids, EXPERTS, size)
        assert blocks.valid.tolist() == [0 <= expert < EXPERTS for expert in ids.tolist()]
        places = blocks.place[blocks.valid].tolist()
        assert len(set(places)) == len(places)
        for pair, place in zip(blocks.valid.nonzero()[:, 0].tolist(), places, strict=True):
            assert blocks.expert[place // size] == ids[pair] and blocks.pair.flatten()[place] == pair


def all_ops(rows: int):
    """(name, arguments) of every op with `rows` rows."""
    for kind in FORMATS:
        yield f"moe_{kind}", make(kind, rows)[0]
    for dtype in (BF16, F32):
        x, weight = normal(rows, HIDDEN, dtype=dtype), normal(EXPERTS, HIDDEN, seed=1, dtype=dtype)
        yield "gate", (x, weight, normal(EXPERTS, seed=2), choose(rows), K, SCALE)


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 64])
def test_contract(rows):
    shared = [(f"moe_{kind}", with_shared(make(kind, rows)[0])) for kind in FORMATS]
    fp32 = make("dense", rows, dtype=F32)[0]
    for name, arguments in [*all_ops(rows), *shared, ("moe_dense", fp32), ("moe_dense", with_shared(fp32))]:
        checks.check_op(name, arguments)
        strided = [checks.row_strided(a) if isinstance(a, torch.Tensor) and a.dim() > 1 else a for a in arguments]
        checks.check_op(name, tuple(strided))
        for actual, expected in zip(*(tree_leaves(getattr(OPS, name)(*a)) for a in (strided, arguments)), strict=True):
            checks.assert_bits_equal(actual, expected)


@pytest.mark.parametrize("name", sorted({name for name, _ in all_ops(1)}))
def test_no_guard_on_the_batch(name):
    checks.check_symbolic_batch(name, lambda batch: dict(all_ops(batch))[name])
    checks.opcheck(name, dict(all_ops(3))[name])


@pytest.mark.parametrize("kind", FORMATS)
def test_no_guard_on_the_batch_with_shared(kind):
    checks.check_symbolic_batch(f"moe_{kind}", lambda batch: with_shared(make(kind, batch)[0]))
    checks.opcheck(f"moe_{kind}", with_shared(make(kind, 3)[0]))


@pytest.mark.parametrize("kind", FORMATS)
def test_leading_dimensions_are_rows(kind):
    arguments, _ = make(kind, 6)
    op, inputs = getattr(OPS, f"moe_{kind}"), {"dense": 3, "fp8": 4, "mxfp4": 4, "nvfp4": 5}[kind]
    shaped = op(*(a.unflatten(0, (2, 3)) for a in arguments[:inputs]), *arguments[inputs:])
    checks.assert_bits_equal(shaped, op(*arguments).unflatten(0, (2, 3)))


def test_wrong_arguments_are_named():
    x, ids, weights, w1, w3, w2, limit = make("dense", 3)[0]
    with pytest.raises(ValueError, match="w1 and w3 must be \\[E, I, d\\] and w2 \\[E, d, I\\]"):
        OPS.moe_dense(x, ids, weights, w1, w3, w3, limit)
    with pytest.raises(ValueError, match="ids must be \\[T, 2\\] int32"):
        OPS.moe_dense(x, ids.long(), weights, w1, w3, w2, limit)
    with pytest.raises(ValueError, match="shared must be \\[T, 64\\] bfloat16 or None, got \\[3, 32\\] bfloat16"):
        OPS.moe_dense(x, ids, weights, w1, w3, w2, limit, x[:, :32])
    with pytest.raises(ValueError, match="shared must be .* got \\[3, 64\\] float32"):
        OPS.moe_fp8(*make("fp8", 3)[0], x.float())
    with pytest.raises(ValueError, match="bias must be \\[8\\] float32"):
        OPS.gate(x, normal(EXPERTS, HIDDEN), torch.zeros(7), choose(3), K, SCALE)
    with pytest.raises(ValueError, match="k must be between 1 and"):
        OPS.gate(x, normal(EXPERTS, HIDDEN), torch.zeros(EXPERTS), choose(3, 9), 9, SCALE)
