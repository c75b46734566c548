"""Experts against transformers (fp32), quantised experts against a loop over rows and slots in fp64."""

import pytest
import torch
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

from dsv4_ops.ops.routed_experts import sorted_pairs
from graph_tests import checks
from graph_tests.ops import scalar
from graph_tests.ops.moe_cases import BF16, EXPERTS, F32, FORMATS, HIDDEN, IDS, LIMIT, K, config, make, normal
from graph_tests.ops.operands import E2M1, E4M3

OPS = torch.ops.dsv4


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
    ids, weights = arguments[IDS[kind]].tolist(), arguments[IDS[kind] + 1].double()

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
    op, inputs = getattr(OPS, f"moe_{kind}"), IDS[kind] + 2
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
        blocks = sorted_pairs(ids, EXPERTS, size)
        assert blocks.valid.tolist() == [0 <= expert < EXPERTS for expert in ids.tolist()]
        places = blocks.place[blocks.valid].tolist()
        assert len(set(places)) == len(places)
        for pair, place in zip(blocks.valid.nonzero()[:, 0].tolist(), places, strict=True):
            assert blocks.expert[place // size] == ids[pair] and blocks.pair.flatten()[place] == pair


CONTRACTS = [*((kind, BF16) for kind in FORMATS), ("dense", F32)]
SHARED = [lambda arguments: arguments, with_shared]


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 64])
@pytest.mark.parametrize(("kind", "dtype"), CONTRACTS)
@pytest.mark.parametrize("shared", SHARED, ids=["routed", "shared"])
def test_contract(shared, kind, dtype, rows):
    name, arguments = f"moe_{kind}", shared(make(kind, rows, dtype=dtype)[0])
    checks.check_op(name, arguments)
    strided = [checks.row_strided(a) if isinstance(a, torch.Tensor) and a.dim() > 1 else a for a in arguments]
    checks.check_op(name, tuple(strided))
    checks.assert_bits_equal(getattr(OPS, name)(*strided), getattr(OPS, name)(*arguments))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shared", SHARED, ids=["routed", "shared"])
def test_no_guard_on_the_batch(shared, kind):
    checks.check_symbolic_batch(f"moe_{kind}", lambda batch: shared(make(kind, batch)[0]))
    checks.opcheck(f"moe_{kind}", shared(make(kind, 3)[0]))


@pytest.mark.parametrize("kind", FORMATS)
def test_leading_dimensions_are_rows(kind):
    arguments, _ = make(kind, 6)
    op, inputs = getattr(OPS, f"moe_{kind}"), IDS[kind] + 2
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
