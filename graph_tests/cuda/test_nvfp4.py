"""Kernels of the family `nvfp4` against their references."""

import pytest
import torch
from torch import Tensor

from dsv4_ops import ops
from dsv4_ops.ops.formats import E2M1_MAX, FP8
from dsv4_ops.ops.nvfp4 import quant_nvfp4_reference
from graph_tests.checks import assert_bits_equal, row_strided
from graph_tests.cuda.kernel_checks import assert_rows_independent, check_kernel, on_cuda
from graph_tests.cuda.quant_inputs import (
    E2M1_TIES,
    E4M3_TIES,
    activations,
    divisors,
    every_divisor,
    near_ties,
    stepped,
)
from graph_tests.ops.test_nvfp4 import adversarial, random_scales

pytestmark = pytest.mark.cuda

ROWS = (0, 1, 3, 130)
DTYPES = (torch.bfloat16, torch.float32)
SCALE_OF = {"tensor": ops.nvfp4_global_scale, "row": ops.nvfp4_row_scale}
WIDTHS = (1024, 1536, 2048, 4096, 7168)


def check_quantisers(x: Tensor, global_scale: Tensor) -> None:
    check_kernel("quant_nvfp4", (x, global_scale))
    if x.dim() == 2:
        check_kernel("quant_nvfp4_128x4", (x, global_scale))


def check_dequantisers(q: Tensor, scale: Tensor, global_scale: Tensor) -> None:
    check_kernel("dequant_nvfp4", (q, scale, global_scale))
    if q.dim() == 2:
        check_kernel("dequant_nvfp4_128x4", (q, ops.nvfp4_scale_to_128x4(scale), global_scale))


@pytest.mark.parametrize("scale_of", SCALE_OF.values(), ids=SCALE_OF)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_quant_and_dequant_have_the_bits_of_the_reference(rows, dtype, scale_of):
    for width in (80, 448):  # columns of scales that fill their tiles, and that do not
        x = activations(rows, width, dtype)
        global_scale = scale_of(x.nan_to_num(0, 1e30, -1e30))
        check_quantisers(x, global_scale)
        check_dequantisers(*ops.quant_nvfp4(x, global_scale), global_scale)


@pytest.mark.parametrize("scale_of", SCALE_OF.values(), ids=SCALE_OF)
@pytest.mark.parametrize("width", WIDTHS)
def test_quant_of_the_models_widths(width, scale_of):
    x = activations(5, width)
    check_quantisers(x, scale_of(x[3:]) if scale_of is ops.nvfp4_global_scale else scale_of(x))


def test_a_thread_that_takes_several_blocks():
    x = activations(4100, 1024)
    check_quantisers(x, ops.nvfp4_row_scale(x))
    check_quantisers(x, torch.tensor([1e-3]))


@pytest.mark.parametrize("scale_of", SCALE_OF.values(), ids=SCALE_OF)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_near_zero_and_huge_blocks(dtype, scale_of):
    check_quantisers(adversarial(dtype), scale_of(adversarial(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_global_scales_that_no_tensor_has(dtype):
    """Zero, subnormal, huge, negative, infinite and NaN global scales, below blocks that hold all of these."""
    special = [0.0, -0.0, 1e-45, 2.0**-130, 2.0**-126, 2.0**-113, 1e-4, 1.0, 2.0**88, 2.0**90, 1e38]
    special += [float("inf"), float("nan"), -1.0, -1e-45, float("-inf")]
    x = torch.randn(len(special), 128, generator=torch.Generator().manual_seed(0))
    x[:, 3], x[:, 4] = 0.0, -0.0
    x[:, 16:32] *= 1e-40
    x[:, 32:48] *= 1e38
    x[:, 48:64] = 0
    x[:, 70], x[:, 90], x[:, 100] = float("inf"), float("nan"), float("-inf")
    check_quantisers(x.to(dtype), torch.tensor(special)[:, None])


def codes_near_ties(step: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """A block for each step: its first element makes the block scale 1, and the step the global scale."""
    x = step.new_zeros(len(step), 16)
    x[:, 0] = E2M1_MAX * step
    x[:, 1:8] = near_ties(step, E2M1_TIES, steps)
    x[:, 8:15] = -near_ties(step, E2M1_TIES, -steps)
    return x, step[:, None]


def scales_near_ties(divisor: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Blocks whose amax over 6 times the global scale is nearly a tie of E4M3."""
    global_scale = divisor[:, None] / E2M1_MAX
    x = divisor.new_zeros(len(divisor), len(E4M3_TIES), 16)
    x[:, :, 5] = near_ties((E2M1_MAX * global_scale)[:, 0], E4M3_TIES, steps)
    return x.flatten(1), global_scale


@pytest.mark.parametrize("steps", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("blocks", [codes_near_ties, scales_near_ties])
def test_quotients_next_to_ties_are_those_of_ieee_division(blocks, steps):
    """A product with the rounded reciprocal of the divisor puts values next to a tie on its wrong side."""
    check_kernel("quant_nvfp4", blocks(divisors(), steps))


@pytest.mark.parametrize("steps", [-1, 0, 1])
@pytest.mark.parametrize(("blocks", "chunk"), [(codes_near_ties, 2**22), (scales_near_ties, 2**19)])
def test_quotients_by_every_significand_are_those_of_ieee_division(blocks, chunk, steps):
    for divisor in every_divisor(chunk):
        x, global_scale = blocks(divisor, steps)
        for actual, expected in zip(
            ops.quant_nvfp4(x, global_scale), quant_nvfp4_reference(x, global_scale), strict=True
        ):
            assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("steps", [-1, 0, 1])
def test_bf16_codes_next_to_ties_are_those_of_ieee_division(steps):
    """Steps for which a bf16 number is next to a tie: the number over the tie."""
    numbers = torch.arange(0x3F80, 0x4000, dtype=torch.int16).view(torch.bfloat16).float()  # all of [1, 2)
    for tie in E2M1_TIES:
        step = stepped(numbers / tie, steps)
        x = torch.zeros(len(step), 16)
        x[:, 0], x[:, 1], x[:, 2] = E2M1_MAX * step, numbers, -numbers
        check_kernel("quant_nvfp4", (x.bfloat16(), step[:, None]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_and_scales(dtype):
    x = row_strided(activations(133, 80, dtype))
    global_scale = row_strided(ops.nvfp4_row_scale(x), 3)
    check_quantisers(x, global_scale)
    q, scale = (row_strided(part) for part in ops.quant_nvfp4(x, global_scale))
    check_kernel("dequant_nvfp4", (q, scale, global_scale))
    check_kernel("dequant_nvfp4_128x4", (q, ops.nvfp4_scale_to_128x4(scale), global_scale))


def test_leading_dimensions_are_rows():
    x = activations(30, 80).view(2, 3, 5, 80)
    for global_scale in (ops.nvfp4_row_scale(x), torch.tensor([0.01])):
        check_quantisers(x, global_scale)
        check_dequantisers(*ops.quant_nvfp4(x, global_scale), global_scale)
    check_kernel("nvfp4_row_scale", (row_strided(x),))
    check_quantisers(x[0, 0, 0], torch.tensor([0.01]))


def test_rows_do_not_depend_on_the_batch():
    x = activations(130, 7168)
    global_scale = ops.nvfp4_row_scale(x)
    assert_rows_independent("nvfp4_row_scale", (x,), batched=(0,), rows=(0, 1, 77, 129))
    assert_rows_independent("quant_nvfp4", (x, global_scale), batched=(0, 1), rows=(0, 1, 77, 129))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 16), (1, 16), (1, 7168), (3, 1000), (130, 1537), (2100, 8)])
def test_global_scale_has_the_bits_of_the_reference(rows, width, dtype):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).mul(3).exp().to(dtype)
    for layout in (lambda x: x, row_strided, lambda x: row_strided(x, 1)):
        check_kernel("nvfp4_global_scale", (layout(x),))


@pytest.mark.parametrize("place", [(0, 0), (77, 4000), (299, 7167)])
@pytest.mark.parametrize("value", [1e30, -1e30, float("inf"), float("nan"), -float("nan")])
def test_global_scale_finds_the_largest_anywhere(place, value):
    x = torch.ones(300, 7168, dtype=torch.bfloat16)
    x[place] = value
    check_kernel("nvfp4_global_scale", (x,))


def test_scales_of_zeros_and_subnormal_numbers():
    for x in (torch.zeros(3, 7168), torch.full((3, 80), -1e-42), torch.full((300, 8192), 1e-36)):
        check_kernel("nvfp4_global_scale", (x,))
        check_kernel("nvfp4_row_scale", (x,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 1000, 1024, 1025, 2056, 7168, 40000])
@pytest.mark.parametrize("rows", ROWS)
def test_row_scale_has_the_bits_of_the_reference(rows, width, dtype):
    x = activations(rows, width + 4, dtype)[:, :width]
    check_kernel("nvfp4_row_scale", (x.contiguous(),))
    check_kernel("nvfp4_row_scale", (x,))


LAYOUTS = [(0, 4), (1, 1), (31, 3), (33, 4), (128, 8), (130, 5), (257, 9), (300, 448)]


@pytest.mark.parametrize(("rows", "columns"), LAYOUTS)
def test_128x4_layout_and_back(rows, columns):
    scale = random_scales(rows, columns)
    for padding in (3, 4):
        check_kernel("nvfp4_scale_to_128x4", (row_strided(scale, padding),))
    check_kernel("nvfp4_scale_to_128x4", (scale,))
    check_kernel("nvfp4_scale_from_128x4", (ops.nvfp4_scale_to_128x4(scale), rows, columns))


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 256])
def test_128x4_padding_is_zero(rows):
    """The outputs of check_kernel start as poison; ceil(rows / 128) tiles of 9 columns are mostly padding."""
    x = activations(rows, 144)
    check_kernel("quant_nvfp4_128x4", (x, ops.nvfp4_row_scale(x)))


@pytest.mark.sanitize
@pytest.mark.parametrize("rows", [2, 5])
def test_small_cases(rows):
    x = activations(rows, 80)
    check_kernel("nvfp4_global_scale", (x,))
    for global_scale in (torch.tensor([0.01]), ops.nvfp4_row_scale(x)):
        check_quantisers(x, global_scale)
        check_dequantisers(*ops.quant_nvfp4(x, global_scale), global_scale)
    check_kernel("nvfp4_row_scale", (x,))
    check_kernel("nvfp4_row_scale", (activations(rows, 1032),))
    scale = random_scales(rows, 5)
    check_kernel("nvfp4_scale_to_128x4", (scale,))
    check_kernel("nvfp4_scale_from_128x4", (ops.nvfp4_scale_to_128x4(scale), rows, 5))


def test_more_than_2_31_elements():
    """Offsets of codes and of strided rows need 64 bits."""
    rows, width = 300_001, 7168
    x = torch.zeros(rows, width + 8, dtype=torch.bfloat16, device="cuda")[:, :width]
    last = activations(3, width).nan_to_num(0, 1, -1).cuda()
    x[-3:] = last
    global_scale = ops.nvfp4_global_scale(x)
    assert_bits_equal(global_scale.cpu(), ops.nvfp4_global_scale(last).cpu())
    assert_bits_equal(ops.nvfp4_row_scale(x)[-3:].cpu(), ops.nvfp4_row_scale(last).cpu())
    q, scale = ops.quant_nvfp4(x, global_scale)
    for result, wanted in zip((q, scale), ops.quant_nvfp4(last, global_scale), strict=True):
        assert_bits_equal(result[-3:].cpu(), wanted.cpu())
    assert not q[0].any() and not scale[0].view(torch.uint8).any()
    restored = ops.dequant_nvfp4(q, scale, global_scale)
    assert_bits_equal(restored[-3:].cpu(), ops.dequant_nvfp4(q[-3:], scale[-3:], global_scale).cpu())


CODES, SCALES = torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 4, dtype=torch.uint8).view(FP8)
FLAT = torch.zeros(512, dtype=torch.uint8).view(FP8)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("nvfp4_global_scale", (torch.zeros(4, 6).t(),), "x must be rows at one distance"),
        ("nvfp4_row_scale", (torch.zeros(4, 6).t(),), "x must be rows at one distance"),
        ("quant_nvfp4", (torch.zeros(2, 33)[:, 1:], torch.ones(1)), "x must be rows that start at multiples of 16"),
        ("quant_nvfp4", (torch.zeros(4, 32), torch.ones(3, 1)), r"global_scale must be \[1\] or \[T, 1\]"),
        ("quant_nvfp4_128x4", (torch.zeros(4, 32), torch.ones(3, 1)), r"global_scale must be \[1\] or \[T, 1\]"),
        ("dequant_nvfp4", (CODES, SCALES[:1], torch.ones(1)), r"scale must be \[2, 4\] float8_e4m3fn"),
        ("dequant_nvfp4_128x4", (CODES, FLAT[:500], torch.ones(1)), r"scale must be \[512\] float8_e4m3fn"),
        ("nvfp4_scale_from_128x4", (FLAT, 129, 4), r"scale must be \[1024\] float8_e4m3fn"),
    ],
)
def test_names_what_it_cannot_read(op, arguments, message):
    with pytest.raises(RuntimeError, match=f"dsv4::{op}: {message}"):
        getattr(ops, op)(*on_cuda(arguments))


def test_out_overload_checks_outputs_and_workspace():
    x = activations(3, 80).cuda()
    q, scale = ops.quant_nvfp4_128x4(x, torch.ones(1, device="cuda"))
    with pytest.raises(RuntimeError, match=r"dsv4::quant_nvfp4_128x4: scale must be \[1024\]"):
        torch.ops.dsv4.quant_nvfp4_128x4.out(x, torch.ones(1, device="cuda"), q=q, scale=scale[:512])
    out = torch.empty(1, device="cuda")
    with pytest.raises(RuntimeError, match="dsv4::nvfp4_global_scale: workspace must be given, with at least 1024"):
        torch.ops.dsv4.nvfp4_global_scale.out(x, scale=out)
    with pytest.raises(RuntimeError, match="dsv4::nvfp4_global_scale: workspace must be"):
        torch.ops.dsv4.nvfp4_global_scale.out(x, scale=out, workspace=x)
