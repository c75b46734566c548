"""Kernels of the family `quant` against their references."""

import pytest
import torch
from torch import Tensor

from dsv4_ops import ops
from dsv4_ops.ops.formats import E4M3_MAX, FP8, cast_e4m3
from graph_tests.checks import assert_bits_equal, row_strided
from graph_tests.cuda.kernel_checks import assert_rows_independent, check_kernel, on_cuda
from graph_tests.cuda.quant_inputs import E4M3_TIES, activations, divisors, every_divisor, near_ties
from graph_tests.ops.test_quant import adversarial

pytestmark = pytest.mark.cuda

ROWS = (0, 1, 3, 130)
DTYPES = (torch.bfloat16, torch.float32)
FP8_OPS = ("quant_fp8", "quant_fp8_fp32_scale")
WIDTHS = (1024, 1536, 4096, 7168)  # q_lora and dim of V4-Flash and V4-Pro


@pytest.mark.parametrize("op", FP8_OPS)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_quant_fp8_has_the_bits_of_the_reference(op, group, dtype, rows):
    check_kernel(op, (activations(rows, 384, dtype), group))


@pytest.mark.parametrize("op", FP8_OPS)
@pytest.mark.parametrize("width", WIDTHS)
def test_quant_fp8_of_the_models_widths(op, width):
    check_kernel(op, (activations(5, width), 128))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_quant_mxfp4_has_the_bits_of_the_reference(rows, dtype):
    check_kernel("quant_mxfp4", (activations(rows, 96, dtype),))
    check_kernel("quant_mxfp4", (activations(rows, 1056, dtype),))


@pytest.mark.parametrize("width", WIDTHS)
def test_quant_mxfp4_of_the_models_widths(width):
    check_kernel("quant_mxfp4", (activations(5, width),))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_subnormal_and_huge_groups(dtype):
    for op in FP8_OPS:
        for group in (32, 64, 128):
            check_kernel(op, (adversarial(dtype), group))
    check_kernel("quant_mxfp4", (adversarial(dtype),))


def codes_near_ties(scale: Tensor, steps: int) -> Tensor:
    """A group of 32 for each scale."""
    x = scale.new_zeros(len(scale), 32)
    x[:, 0] = scale * E4M3_MAX
    x[:, 1 : 1 + len(E4M3_TIES)] = near_ties(scale, E4M3_TIES, steps)
    return x


@pytest.mark.parametrize("steps", [-2, -1, 0, 1, 2])
def test_fp32_scale_divides_like_ieee_next_to_ties(steps):
    """A product with the rounded reciprocal of the scale puts values next to a tie on its wrong side."""
    check_kernel("quant_fp8_fp32_scale", (codes_near_ties(divisors(), steps), 32))


@pytest.mark.parametrize("steps", [-1, 0, 1])
def test_fp32_scale_of_every_significand_divides_like_ieee(steps):
    """The reference is computed on the GPU, where torch divides by a tensor, but multiplies by 1 / a Python number."""
    for divisor in every_divisor(2**21):
        x = codes_near_ties(divisor, steps)
        scale = x[:, :1] / x.new_tensor(E4M3_MAX)
        q, actual_scale = ops.quant_fp8_fp32_scale(x, 32)
        assert torch.equal(actual_scale, scale)
        assert torch.equal(q.view(torch.uint8), cast_e4m3(x / scale).view(torch.uint8))


@pytest.mark.parametrize("factor", [2.0**119, 2.0**111, 2.0**93, 2.0**92, 2.0**91, 1e-4, 2.0**-20, 2.0**-149])
def test_fp32_scale_of_every_size(factor):
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)).clamp(-1, 1) * factor
    x[1, 5], x[2, 6], x[3, 7] = float("inf"), float("nan"), -0.0
    check_kernel("quant_fp8_fp32_scale", (x, 32))


@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("groups", [1, 3, 8, 96])
@pytest.mark.parametrize("rows", ROWS)
def test_dequant_fp8_has_the_bits_of_the_reference(rows, groups, scale_dtype):
    quantise = ops.quant_fp8 if scale_dtype == torch.uint8 else ops.quant_fp8_fp32_scale
    q, _ = quantise(activations(rows, 384), 128)
    generator = torch.Generator().manual_seed(rows)
    scale = torch.randint(256, (rows, groups), generator=generator).to(torch.uint8)
    if scale_dtype == torch.float32:
        scale = scale.float().sub(100).mul(0.1).exp()
    check_kernel("dequant_fp8", (q, scale))
    check_kernel("dequant_fp8", (row_strided(q), row_strided(scale)))


def test_dequant_of_every_code_and_every_scale_byte():
    codes = torch.arange(256).to(torch.uint8).repeat(256, 1)
    scale = torch.arange(256).to(torch.uint8)[:, None]
    check_kernel("dequant_fp8", (codes.view(FP8), scale))
    check_kernel("dequant_mxfp4", (codes, scale.repeat(1, 16)))


@pytest.mark.parametrize("rows", ROWS)
def test_dequant_mxfp4_has_the_bits_of_the_reference(rows):
    q, scale = ops.quant_mxfp4(activations(rows, 1056))
    check_kernel("dequant_mxfp4", (q, scale))
    check_kernel("dequant_mxfp4", (row_strided(q), row_strided(scale)))


@pytest.mark.sanitize
@pytest.mark.parametrize("rows", [2, 5])
def test_small_cases(rows):
    x = activations(rows, 160)
    for op in FP8_OPS:
        check_kernel(op, (x, 32))
        check_kernel("dequant_fp8", getattr(ops, op)(x, 32))
    check_kernel("quant_mxfp4", (x,))
    check_kernel("dequant_mxfp4", ops.quant_mxfp4(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(dtype):
    x = row_strided(activations(133, 384, dtype))
    for op in FP8_OPS:
        check_kernel(op, (x, 64))
    check_kernel("quant_mxfp4", (x,))


def test_leading_dimensions_are_rows():
    x = activations(30, 256).view(2, 3, 5, 256)
    check_kernel("quant_fp8", (x, 128))
    check_kernel("quant_mxfp4", (row_strided(x),))
    check_kernel("dequant_fp8", ops.quant_fp8(x, 128))
    check_kernel("dequant_mxfp4", ops.quant_mxfp4(x))
    check_kernel("quant_fp8", (x[0, 0, 0], 128))


def test_rows_do_not_depend_on_the_batch():
    x = activations(130, 7168)
    for op in FP8_OPS:
        assert_rows_independent(op, (x, 128), batched=(0,), rows=(0, 1, 77, 129))
    assert_rows_independent("quant_mxfp4", (x,), batched=(0,), rows=(0, 1, 77, 129))


def test_more_than_2_31_elements():
    """Offsets of codes and of strided rows need 64 bits."""
    rows, width = 300_001, 7168
    x = torch.zeros(rows, width + 8, dtype=torch.bfloat16, device="cuda")[:, :width]
    last = activations(3, width).cuda()
    x[-3:] = last
    for op, arguments in (("quant_fp8", (128,)), ("quant_mxfp4", ())):
        expected = getattr(ops, op)(last, *arguments)
        for result, wanted in zip(getattr(ops, op)(x, *arguments), expected, strict=True):
            assert_bits_equal(result[-3:].cpu(), wanted.cpu())
            assert result[0].view(torch.uint8).unique().numel() == 1


FP8_CODES = torch.zeros(2, 96, dtype=torch.uint8).view(FP8)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("quant_fp8", (torch.zeros(128, 64).t(), 128), "x must be rows at one distance"),
        ("quant_fp8", (torch.zeros(2, 2, 40)[..., 2:34], 32), "x must be rows that start at multiples of 16 bytes"),
        ("quant_mxfp4", (torch.zeros(2, 33)[:, 1:],), "x must be rows that start at multiples of 16 bytes"),
        ("dequant_fp8", (FP8_CODES, torch.zeros(2, 16)), "scale must be .* multiple of 4"),
        ("dequant_fp8", (FP8_CODES, torch.zeros(1, 3)), r"scale must be \[2, 3\]"),
        ("dequant_fp8", (FP8_CODES[:, 1:33], torch.zeros(2, 1)), "q must be rows that start at multiples of 4 bytes"),
        ("dequant_mxfp4", (FP8_CODES.view(torch.uint8), torch.zeros(1, 6).byte()), r"scale must be \[2, 6\]"),
    ],
)
def test_names_a_layout_that_it_cannot_read(op, arguments, message):
    with pytest.raises(RuntimeError, match=f"dsv4::{op}: {message}"):
        getattr(ops, op)(*on_cuda(arguments))


@pytest.mark.parametrize("op", FP8_OPS)
def test_out_overload_checks_its_outputs(op):
    x = activations(3, 128).cuda()
    q, scale = getattr(ops, op)(x, 32)
    out = getattr(torch.ops.dsv4, op).out
    with pytest.raises(RuntimeError, match=f"dsv4::{op}: q must be"):
        out(x, 32, q=q[:2], scale=scale)
    with pytest.raises(RuntimeError, match=f"dsv4::{op}: scale must be"):
        out(x, 32, q=q, scale=scale[:, :2])
    with pytest.raises(RuntimeError, match=f"dsv4::{op}: x must be quantised in groups of 32, 64 or 128"):
        out(x, 16, q=q, scale=scale)
