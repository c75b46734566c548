"""Kernels of the family `quant` against their references."""

import pytest
import torch

from graph_tests.checks import row_strided
from graph_tests.cuda.kernel_checks import assert_rows_independent, check_kernel

pytestmark = pytest.mark.cuda

ROWS = (0, 1, 3, 130)
DTYPES = (torch.bfloat16, torch.float32)


def activations(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Values of many magnitudes, with groups of zeros, the smallest and largest numbers, infinity and NaN."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    x = torch.randn(rows, width, generator=generator) * torch.randn(rows, 1, generator=generator).mul(6).exp()
    if rows > 2:
        x[0] = 0
        x[1, ::7] = 2.0**-130
        x[2, 3], x[2, width // 2] = float("nan"), float("-inf")
        x[-1, 0] = torch.finfo(dtype).max
    return x.to(dtype)


@pytest.mark.parametrize("op", ["quant_fp8", "quant_fp8_fp32_scale"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_quant_fp8_has_the_bits_of_the_reference(op, group, dtype, rows):
    check_kernel(op, (activations(rows, 384, dtype), group))


def test_quant_fp8_takes_strided_rows():
    check_kernel("quant_fp8", (row_strided(activations(5, 256)), 128))


def test_quant_fp8_rows_do_not_depend_on_the_batch():
    assert_rows_independent("quant_fp8", (activations(130, 7168), 128), batched=(0,), rows=(0, 1, 77, 129))


def test_quant_fp8_names_a_layout_that_it_cannot_read():
    x = activations(128, 64).cuda().t()
    with pytest.raises(RuntimeError, match="dsv4::quant_fp8: x must be rows at one distance"):
        torch.ops.dsv4.quant_fp8(x, 128)
