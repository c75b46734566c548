"""Kernels of rms_norm and swiglu against their references."""

import pytest
import torch

from graph_tests.checks import assert_bits_equal, row_strided
from graph_tests.cuda.kernel_checks import almost_bits, assert_rows_independent, check_kernel, close, on_cuda
from graph_tests.cuda.norm_inputs import (
    EPS,
    exact_gate_up,
    exact_rows,
    hard_gate_up,
    hard_rows,
    random_gate_up,
    random_rows,
    same_values,
)

pytestmark = pytest.mark.cuda

OPS = torch.ops.dsv4
F32, BF16 = torch.float32, torch.bfloat16
DTYPES = (BF16, F32)
# V4-Flash and Pro (q_lora, head_dim, dim), whole vectors of 8 or not, more than registers hold
WIDTHS = [1, 5, 8, 100, 128, 512, 1024, 1536, 4096, 7168, 7176, 16384, 20000]
INNER = [1, 3, 8, 100, 264, 2048, 3072]
# Rows from which on other tactics are taken: CTAs of half the threads (264), two vectors a thread (2^17 vectors).
MANY_ROWS, MANY_GATED_ROWS = 300, 520

# A sum of squares in another order is off by at most 16 roundings of 2^-24 in either order, 1 / rms by half of that,
# three more roundings follow on both sides: 2^-20. A bf16 rounding (steps of 2^-8 or less) comes out differently where
# the value lies within that of a tie: at most 2^-11 of the elements.
NORM = {BF16: almost_bits(2**-11), F32: close(2**-20)}
# exp within 2 ulp on both sides, four more roundings: below 2^-20. For bf16 exp and quotient are approximate, with an
# error of (|gate| + 5) 2^-24, and |gate| is below 40: 2^-18, so that at most 2^-9 of the elements round differently.
GATED = {BF16: almost_bits(2**-9), F32: close(2**-20)}


# ---- rms_norm ----


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_has_the_bits_of_the_reference_where_sums_are_exact(width):
    check_kernel("rms_norm", (*exact_rows(3, width), EPS))


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [100, 1536, 7168, 8192])
def test_rms_norm_takes_every_dtype(width, dtype, weight_dtype):
    x, weight = exact_rows(3, width, dtype)
    check_kernel("rms_norm", (x, weight.to(weight_dtype), EPS))


@pytest.mark.parametrize("rows", [0, 1, 3, 130, MANY_ROWS])
@pytest.mark.parametrize("width", [100, 1024, 7168])
def test_rms_norm_of_any_number_of_rows(width, rows):
    check_kernel("rms_norm", (*exact_rows(rows, width), EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", [(400, 100), (9, 4096), (9, 7168), (9, 20000)])
def test_rms_norm_of_random_rows(rows, width, dtype):
    check_kernel("rms_norm", (*random_rows(rows, width, dtype), EPS), NORM[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [100, 4096])
def test_rms_norm_of_zeros_infinities_and_nan(width, dtype):
    check_kernel("rms_norm", (*hard_rows(width, dtype), EPS), same_values)


@pytest.mark.sanitize
@pytest.mark.parametrize("width", [13, 1024])
def test_rms_norm_of_a_small_case(width):
    check_kernel("rms_norm", (*exact_rows(2, width), EPS))


@pytest.mark.parametrize("padding", [1, 16])
def test_rms_norm_takes_strided_rows_that_start_anywhere(padding):
    x, weight = exact_rows(5, 256)
    check_kernel("rms_norm", (row_strided(x, padding), weight, EPS))
    check_kernel("rms_norm", (row_strided(x.view(5, 1, 256).expand(5, 3, 256), padding), weight, EPS))


@pytest.mark.parametrize("width", [104, 1536, 4096, 7168])
def test_rms_norm_gives_the_same_bits_wherever_a_row_starts(width):
    """Rows at multiples of 16 bytes stay in registers, others are read element by element: one order of the sum."""
    x, weight = random_rows(5, width)
    x, strided, weight = on_cuda((x, row_strided(x, 3), weight))
    expected = OPS.rms_norm(x, weight, EPS)
    assert_bits_equal(OPS.rms_norm(strided, weight, EPS), expected)
    shifted = torch.empty(5 * width + 1, dtype=BF16, device="cuda")[1:].view(5, width).copy_(x)
    assert_bits_equal(OPS.rms_norm(shifted, weight, EPS), expected)


@pytest.mark.parametrize("width", [512, 1536, 4096, 7168])
def test_rms_norm_rows_do_not_depend_on_the_batch(width):
    assert_rows_independent("rms_norm", (*random_rows(MANY_ROWS, width), EPS), batched=(0,), rows=(0, 1, 77, 299))


def test_rms_norm_rows_do_not_depend_on_the_number_of_threads():
    """Below 264 rows a CTA has as many threads as a row has pairs of vectors, from there on half as many."""
    x, weight = (tensor.cuda() for tensor in random_rows(MANY_ROWS, 7168))
    many = OPS.rms_norm(x, weight, EPS)
    assert_bits_equal(many[:200], OPS.rms_norm(x[:200], weight, EPS))


def test_rms_norm_names_what_it_cannot_take():
    x, weight = (tensor.cuda() for tensor in exact_rows(4, 64))
    y = torch.empty_like(x)
    with pytest.raises(RuntimeError, match=r"dsv4::rms_norm: x must be rows at one distance"):
        OPS.rms_norm(torch.zeros(64, 64, device="cuda").t(), weight, EPS)
    with pytest.raises(RuntimeError, match=r"dsv4::rms_norm: weight must be \[64\] bfloat16 or float32, got \[32\]"):
        OPS.rms_norm.out(x, weight[:32], EPS, y=y)
    with pytest.raises(RuntimeError, match=r"dsv4::rms_norm: weight must be contiguous"):
        OPS.rms_norm.out(x, weight.repeat(2)[::2], EPS, y=y)
    with pytest.raises(RuntimeError, match=r"dsv4::rms_norm: y must be contiguous \[4, 64\] bfloat16, got \[3, 64\]"):
        OPS.rms_norm.out(x, weight, EPS, y=y[:3])
    with pytest.raises(RuntimeError, match=r"dsv4::rms_norm: y must be contiguous \[4, 64\] bfloat16, got .* float32"):
        OPS.rms_norm.out(x, weight, EPS, y=y.float())
    with pytest.raises(RuntimeError, match=r"dsv4::rms_norm: weight must be on cuda:\d+ like the other tensors"):
        OPS.rms_norm.out(x, weight.cpu(), EPS, y=y)


# ---- swiglu ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", INNER)
def test_swiglu_has_the_bits_of_the_reference_where_exp_is_no_matter(inner, dtype):
    check_kernel("swiglu", exact_gate_up(3, inner, dtype))


@pytest.mark.parametrize("rows", [0, 1, 3, 130, MANY_GATED_ROWS])
def test_swiglu_of_any_number_of_rows(rows):
    check_kernel("swiglu", exact_gate_up(rows, 2048))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, inner", [(400, 100), (9, 2048), (9, 3072)])
def test_swiglu_of_random_rows(rows, inner, dtype):
    check_kernel("swiglu", random_gate_up(rows, inner, dtype), GATED[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [10.0, float("inf")])
@pytest.mark.parametrize("inner", [100, 256])
def test_swiglu_of_infinities_nan_and_very_negative_gates(inner, limit, dtype):
    """silu of a gate below -87.3 is at most 2^-119, and may come out as 0 for bf16."""
    check_kernel("swiglu", hard_gate_up(inner, dtype, limit), close(2**-7 if dtype == BF16 else 2**-20, 2.0**-110))


@pytest.mark.sanitize
@pytest.mark.parametrize("inner", [5, 256])
def test_swiglu_of_a_small_case(inner):
    check_kernel("swiglu", exact_gate_up(2, inner))


@pytest.mark.parametrize("padding", [1, 16])
def test_swiglu_takes_strided_rows_that_start_anywhere(padding):
    gate_up, route_weight, limit = exact_gate_up(5, 128)
    check_kernel("swiglu", (row_strided(gate_up, padding), route_weight, limit))
    leading = row_strided(gate_up.view(5, 1, 256).expand(5, 3, 256), padding)
    check_kernel("swiglu", (leading, route_weight[:, None].repeat(1, 3), limit))


def test_swiglu_rows_do_not_depend_on_the_batch():
    arguments = random_gate_up(MANY_GATED_ROWS, 2048)
    assert_rows_independent("swiglu", arguments, batched=(0, 1), rows=(0, 1, 77, 519))


def test_swiglu_names_what_it_cannot_take():
    gate_up, route_weight, limit = exact_gate_up(4, 64)
    gate_up, route_weight, h = gate_up.cuda(), route_weight.cuda(), torch.empty(4, 64, dtype=BF16, device="cuda")
    with pytest.raises(RuntimeError, match=r"dsv4::swiglu: gate_up must be \[..., 2 \* I\], got \[4, 127\]"):
        OPS.swiglu.out(gate_up[:, :127], route_weight, limit, h=h)
    with pytest.raises(
        RuntimeError, match=r"dsv4::swiglu: route_weight must be .*one for each row of gate_up \[4, 128\]"
    ):
        OPS.swiglu.out(gate_up, route_weight[:3], limit, h=h)
    with pytest.raises(RuntimeError, match=r"dsv4::swiglu: route_weight must be .*, got \[4\] bfloat16"):
        OPS.swiglu.out(gate_up, route_weight.bfloat16(), limit, h=h)
    with pytest.raises(RuntimeError, match=r"dsv4::swiglu: h must be contiguous \[4, 64\] bfloat16, got \[4, 32\]"):
        OPS.swiglu.out(gate_up, route_weight, limit, h=h[:, :32])
