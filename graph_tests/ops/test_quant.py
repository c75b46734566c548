"""FP8 and MXFP4 quantisers against the scalar judges, and their op contracts."""

import pytest
import torch

from dsv4_ops import ops
from graph_tests import checks
from graph_tests.checks import assert_bits_equal
from graph_tests.ops import scalar

K = 256
BATCHES = [0, 1, 2, 7, 64]
DTYPES = [torch.bfloat16, torch.float32]
LAYOUTS = [lambda x: x, checks.row_strided]


def adversarial(dtype: torch.dtype) -> torch.Tensor:
    """[13, 256]: zeros, subnormals, near-zero and huge groups, amax exactly at a multiple of the largest code, ties."""
    x = torch.randn(13, K, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    x[1] = -0.0
    x[2] *= 1e-40
    x[3] *= 1e-30
    x[4] *= 1e36
    x[5] = x[5].clamp(-2, 2) * 1e-5
    for row, largest in ((6, 448.0), (7, 6.0)):  # 8 groups of 32, amax = largest * 2^k
        for group in range(8):
            part = x[row, 32 * group : 32 * group + 32]
            part.clamp_(-1, 1).mul_(2.0 ** (group - 4))[3] = largest * 2.0 ** (group - 4)
    x[8] = x[6] * 1.0078125  # one bf16 step above
    x[9] = torch.arange(K) % 97 / 16.0 - 3  # many ties
    x[10, ::32] = 1e4  # one outlier a group
    x[11] = torch.logspace(-30, 30, K)
    x[12, 1:] = 0
    return x.to(dtype)


def batch(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, K, generator=torch.Generator().manual_seed(size)).to(dtype)


def expected_of(judge, x: torch.Tensor) -> tuple[torch.Tensor, list]:
    rows = [judge(row) for row in x.float().tolist()]
    return torch.tensor([codes for codes, _ in rows], dtype=torch.uint8), [scales for _, scales in rows]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_quant_fp8_is_the_judge_on_adversarial_rows(group, dtype):
    x = adversarial(dtype)
    codes, scales = expected_of(lambda row: scalar.quant_fp8(row, group), x)
    q, scale = ops.quant_fp8(x, group)
    assert_bits_equal(q.view(torch.uint8), codes)
    assert_bits_equal(scale, torch.tensor(scales, dtype=torch.uint8))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_quant_fp8_fp32_scale_is_the_judge_on_adversarial_rows(group):
    x = adversarial(torch.float32)
    codes, scales = expected_of(lambda row: scalar.quant_fp8_fp32_scale(row, group), x)
    q, scale = ops.quant_fp8_fp32_scale(x, group)
    assert_bits_equal(q.view(torch.uint8), codes)
    assert_bits_equal(scale, torch.tensor(scales))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quant_mxfp4_is_the_judge_on_adversarial_rows(dtype):
    x = adversarial(dtype)
    codes, scales = expected_of(scalar.quant_mxfp4, x)
    q, scale = ops.quant_mxfp4(x)
    assert_bits_equal(q, codes)
    assert_bits_equal(scale, torch.tensor(scales, dtype=torch.uint8))


def test_quant_mxfp4_puts_the_even_element_into_the_low_nibble():
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([1.0, 6.0, -0.5, 3.0])
    q, scale = ops.quant_mxfp4(x)
    assert q[0, :2].tolist() == [0x72, 0x59] and scale.tolist() == [[127]]


@pytest.mark.parametrize("quantise, largest", [(lambda x: ops.quant_fp8(x, 32), 448.0), (ops.quant_mxfp4, 6.0)])
def test_power_of_two_scales_use_at_least_half_of_the_codes_range(quantise, largest):
    """amax / scale is in (largest / 2, largest]; one fp32 rounding of the product may pass it by an ulp."""
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 20, 64)[:, None]
    _, scale = quantise(x)
    exact = torch.tensor([[2.0 ** (byte - 127)] for (byte,) in scale.tolist()], dtype=torch.float64)
    ratio = x.double().abs().amax(-1, keepdim=True) / exact
    assert (ratio > largest / 2).all() and (ratio <= largest * (1 + 2**-23)).all()


def test_dequant_fp8_multiplies_every_code_with_its_scale():
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 256, (3, 128), generator=generator).to(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 5
    scale = torch.randint(1, 240, (3, 4), generator=generator).to(torch.uint8)
    expected = [
        [scalar.f32(scalar.e4m3_value(code) * 2.0 ** (scales[i // 32] - 127)) for i, code in enumerate(row)]
        for row, scales in zip(codes.tolist(), scale.tolist(), strict=True)
    ]
    assert_bits_equal(ops.dequant_fp8(codes.view(torch.float8_e4m3fn), scale), torch.tensor(expected))


def test_dequant_fp8_accepts_fp32_scales():
    codes = torch.tensor([[0x38, 0x7E, 0xC0, 0x01]], dtype=torch.uint8)  # 1, 448, -2, 2^-9
    scale = torch.tensor([[0.1, 3.0]])
    tenth = scalar.f32(0.1)
    expected = torch.tensor([[tenth, scalar.f32(448 * tenth), -6.0, 3 * 2.0**-9]])
    assert_bits_equal(ops.dequant_fp8(codes.view(torch.float8_e4m3fn), scale), expected)


def test_dequant_mxfp4_multiplies_every_code_with_its_scale():
    q = torch.arange(32, dtype=torch.uint8).view(1, 32) * 7
    scale = torch.tensor([[127 - 60, 127 + 60]], dtype=torch.uint8)
    codes = [nibble for byte in q[0].tolist() for nibble in (byte % 16, byte // 16)]
    expected = [scalar.e2m1_value(code) * 2.0 ** (-60 if i < 32 else 60) for i, code in enumerate(codes)]
    assert_bits_equal(ops.dequant_mxfp4(q, scale), torch.tensor([expected]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_values_survive_a_round_trip(dtype):
    """A dequantised row quantises to the same values: its amax is a code times the scale."""
    x = batch(7, torch.float32)
    for quantise, dequantise in (
        (lambda x: ops.quant_fp8(x, 64), ops.dequant_fp8),
        (ops.quant_mxfp4, ops.dequant_mxfp4),
    ):
        once = dequantise(*quantise(x))
        assert_bits_equal(dequantise(*quantise(once.to(dtype))), once)


def test_a_nan_reaches_the_dequantised_group_in_every_format():
    x = batch(2, torch.float32)
    x[1, 40] = torch.nan
    for values in (ops.dequant_fp8(*ops.quant_fp8(x, 32)), ops.dequant_mxfp4(*ops.quant_mxfp4(x))):
        expected = torch.zeros(2, K, dtype=torch.bool)
        expected[1, 32:64] = True
        assert torch.equal(values.isnan(), expected)


def test_leading_dimensions_are_rows():
    x = batch(6, torch.bfloat16)
    for name, arguments in (("quant_fp8", (32,)), ("quant_fp8_fp32_scale", (32,)), ("quant_mxfp4", ())):
        op = getattr(ops, name)
        for flat, nested in zip(op(x, *arguments), op(x.view(2, 3, K), *arguments), strict=True):
            assert_bits_equal(nested.flatten(0, 1), flat)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "row_strided"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", BATCHES)
def test_op_contract(size, dtype, layout):
    x = layout(batch(size, dtype))
    checks.check_op("quant_fp8", (x, 32))
    checks.check_op("quant_fp8_fp32_scale", (x, 128))
    checks.check_op("quant_mxfp4", (x,))
    q, scale = (layout(part) for part in ops.quant_fp8(x, 32))
    checks.check_op("dequant_fp8", (q, scale))
    q, scale = (layout(part) for part in ops.quant_fp8_fp32_scale(x, 32))
    checks.check_op("dequant_fp8", (q, scale))
    q, scale = (layout(part) for part in ops.quant_mxfp4(x))
    checks.check_op("dequant_mxfp4", (q, scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_give_the_same_bits(dtype):
    x = batch(7, dtype)
    for strided in (checks.row_strided(x), x.t().contiguous().t()):
        for name, arguments in (("quant_fp8", (32,)), ("quant_fp8_fp32_scale", (32,)), ("quant_mxfp4", ())):
            op = getattr(ops, name)
            for actual, expected in zip(op(strided, *arguments), op(x, *arguments), strict=True):
                assert actual.is_contiguous()
                assert_bits_equal(actual, expected)
    for parts, op in ((ops.quant_fp8(x, 32), ops.dequant_fp8), (ops.quant_mxfp4(x), ops.dequant_mxfp4)):
        actual = op(*(part.t().contiguous().t() for part in parts))
        assert actual.is_contiguous()
        assert_bits_equal(actual, op(*parts))


def test_no_guard_on_the_batch():
    checks.check_symbolic_batch("quant_fp8", lambda size: (batch(size, torch.bfloat16), 32))
    checks.check_symbolic_batch("quant_fp8_fp32_scale", lambda size: (batch(size, torch.bfloat16), 32))
    checks.check_symbolic_batch("quant_mxfp4", lambda size: (batch(size, torch.bfloat16),))
    checks.check_symbolic_batch("dequant_fp8", lambda size: ops.quant_fp8(batch(size, torch.bfloat16), 32))
    checks.check_symbolic_batch("dequant_mxfp4", lambda size: ops.quant_mxfp4(batch(size, torch.bfloat16)))


def test_opcheck():
    x = batch(3, torch.bfloat16)
    checks.opcheck("quant_fp8", (x, 64))
    checks.opcheck("quant_fp8_fp32_scale", (x, 64))
    checks.opcheck("quant_mxfp4", (x,))
    checks.opcheck("dequant_fp8", ops.quant_fp8(x, 64))
    checks.opcheck("dequant_mxfp4", ops.quant_mxfp4(x))


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("quant_fp8", (torch.zeros(2, 96), 64), r"multiple of 64, got \[2, 96\] float32"),
        ("quant_fp8", (torch.zeros(2, 96), 48), r"one of \(32, 64, 128\), got 48"),
        ("quant_fp8", (torch.zeros(2, 64, dtype=torch.float16), 64), "bfloat16 or float32.* got .* float16"),
        ("quant_mxfp4", (torch.zeros(2, 48),), r"multiple of 32, got \[2, 48\]"),
        ("dequant_fp8", (torch.zeros(2, 64), torch.zeros(2, 1)), "float8_e4m3fn"),
        ("dequant_mxfp4", (torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.uint8)), "K/32"),
    ],
)
def test_refuses_by_name_what_it_cannot_quantise(name, arguments, message):
    with pytest.raises(ValueError, match=f"dsv4::{name}: .*{message}"):
        getattr(ops, name)(*arguments)
