"""Attention with quantised output: the codes of attention and quant_fp8, in the layout of the grouped product."""

import math

import pytest
import torch

from dsv4_ops.ops.attention_quant import GROUP
from dsv4_ops.registry import TABLE
from graph_tests import checks
from graph_tests.ops import scalar
from graph_tests.ops.attention_cases import FULL, make, sequence_arguments

OPS = torch.ops.dsv4
KINDS = ("window", "selected", "compressed")
BF16, F32 = torch.bfloat16, torch.float32
NARROW = (128, 64)  # head dim and rope dim: one group a head


def name_of(kind: str) -> str:
    return f"sparse_attention_{kind}_quant_fp8"


def arguments_of(kind: str, positions: list[list[int]], **options) -> tuple:
    return make(kind, positions, **({"dims": NARROW, "dtype": BF16} | options))[0]


def assert_is_attention_then_quantiser(kind: str, arguments: tuple) -> None:
    codes, scale, lse = getattr(OPS, name_of(kind))(*arguments)
    o, expected_lse = getattr(OPS, f"sparse_attention_{kind}")(*arguments)
    expected_codes, expected_scale = OPS.quant_fp8(o.flatten(-2), GROUP)
    checks.assert_bits_equal(codes.flatten(-2), expected_codes)
    checks.assert_bits_equal(scale.flatten(-2), expected_scale)
    checks.assert_bits_equal(lse, expected_lse)


def test_one_key_by_hand():
    """Position 0 sees its own key alone. With the sink at the key's score that has half of the weight; position 0 is
    turned by nothing. So o = key / 2: from -32 to 31.5 here, whose scale is 2^ceil(log2(32 / 448)) = 2^-3."""
    key = torch.arange(-64, 64).float()
    pool, table = key.view(1, -1).repeat(1, 4), torch.zeros(1, 1, dtype=torch.int32)
    q = torch.zeros(1, 1, 2, 128, dtype=BF16)
    turns = torch.tensor([1.0, 0.0]).repeat(4, 32)
    at = torch.zeros(1, 1, dtype=torch.int32)
    codes, scale, lse = OPS.sparse_attention_window_quant_fp8(q, pool, torch.zeros(2), turns, table, at, 2, 4)
    assert scale.shape == (1, 1, 2, 1) and (scale == 127 - 3).all()
    assert codes.shape == q.shape and codes.dtype == torch.float8_e4m3fn
    expected = [scalar.e4m3_code(value / 2 * 8) for value in key.tolist()]
    assert codes.view(torch.uint8).flatten(0, 2).tolist() == [expected, expected]
    assert lse.tolist() == [[[0.0, 0.0]]]


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("dims", [NARROW, FULL])
@pytest.mark.parametrize("kind", KINDS)
def test_is_attention_then_quantiser(kind, dims, dtype):
    positions = [[3, 4, 5], [60, 61, 62], [0, -1, -1], [-1, -1, -1]]
    assert_is_attention_then_quantiser(kind, arguments_of(kind, positions, dims=dims, dtype=dtype, heads=4))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_keys_have_codes_of_zero_and_the_smallest_scale(kind):
    codes, scale, lse = getattr(OPS, name_of(kind))(*arguments_of(kind, [[-1], [7]]))
    assert (codes[0].float() == 0).all() and (lse[0] == -torch.inf).all()
    assert (scale[0] == 127 + math.ceil(math.log2(1e-4 / 448))).all()
    assert (codes[1].float() != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_operands_of_the_grouped_product_are_views(kind):
    arguments = arguments_of(kind, [[20, 21], [3, 4]], heads=8)
    codes, scale, _ = getattr(OPS, name_of(kind))(*arguments)
    groups, rank = 2, 128
    x, x_scale = (part.flatten(-2).unflatten(-1, (groups, -1)) for part in (codes, scale))
    assert x.data_ptr() == codes.data_ptr() and x_scale.data_ptr() == scale.data_ptr()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(groups * rank, x.shape[-1], generator=generator).to(torch.float8_e4m3fn)
    weight_scale = torch.rand(groups, x.shape[-1] // 128, generator=generator)
    o, _ = getattr(OPS, f"sparse_attention_{kind}")(*arguments)
    expected = OPS.quant_fp8(o.flatten(-2).unflatten(-1, (groups, -1)), GROUP)
    checks.assert_bits_equal(
        OPS.grouped_linear_fp8(x, x_scale, weight, weight_scale),
        OPS.grouped_linear_fp8(*expected, weight, weight_scale),
    )


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind, batch):
    places = sequence_arguments(kind)
    for dtype, packed in ((BF16, True), (F32, False)):
        arguments = arguments_of(kind, [[20 + b, 21 + b] for b in range(max(batch, 1))], dtype=dtype, packed=packed)
        cut = tuple(a[:batch] if place in places else a for place, a in enumerate(arguments))
        checks.check_op(name_of(kind), cut)
        strided = tuple(checks.row_strided(a) if place in places else a for place, a in enumerate(cut))
        checks.check_op(name_of(kind), strided)


@pytest.mark.parametrize("kind", KINDS)
def test_no_guard_on_the_batch(kind):
    def arguments(batch: int) -> tuple:
        return arguments_of(kind, [[20 + b, 21 + b] for b in range(batch)])

    checks.check_symbolic_batch(name_of(kind), arguments)
    checks.opcheck(name_of(kind), arguments(3))


@pytest.mark.parametrize("kind", KINDS)
def test_workspace_is_that_of_attention(kind):
    arguments = arguments_of(kind, [[20], [30]])
    plain, quantised = (TABLE[name].workspace(*arguments) for name in (f"sparse_attention_{kind}", name_of(kind)))
    assert plain.shape == quantised.shape and plain.numel() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_arguments_are_named(kind):
    name = name_of(kind)
    q, *rest = arguments_of(kind, [[20, 21]])
    sink = 1 if kind == "window" else 2
    with pytest.raises(ValueError, match=f"dsv4::{name}: sink must be"):
        getattr(OPS, name)(q, *rest[:sink], rest[sink][:4], *rest[sink + 1 :])
    with pytest.raises(ValueError, match=f"dsv4::{name}: q must be .* with D a multiple of 128, got .* 80"):
        getattr(OPS, name)(*arguments_of(kind, [[20, 21]], dims=(80, 16)))
