"""Fused quantisers against their references, and bit for bit against the two steps that they fuse."""

import pytest
import torch
from torch import Tensor

from dsv4_ops.ops.nvfp4 import nvfp4_row_scale_reference, quant_nvfp4_reference
from dsv4_ops.ops.quant import quant_fp8_reference, quant_mxfp4_reference
from graph_tests.checks import assert_bits_equal, row_strided
from graph_tests.cuda.kernel_checks import assert_rows_independent, bits, check_kernel
from graph_tests.cuda.norm_inputs import (
    EPS,
    exact_gate_up,
    exact_rows,
    hard_gate_up,
    hard_rows,
    interleaved,
    random_gate_up,
    random_rows,
    same_values,
)

pytestmark = pytest.mark.cuda

OPS = torch.ops.dsv4
F32, BF16 = torch.float32, torch.bfloat16
DTYPES = (BF16, F32)
FORMS = ["fp8_32", "fp8_64", "fp8_128", "mxfp4", "nvfp4"]  # with the group of FP8
GATED = ["swiglu", "swiglu_interleaved"]
WIDTHS = [128, 384, 1024, 1536, 4096, 7168, 8192, 20096]  # the last is more than registers hold
INNER = [128, 384, 2048, 3072, 8320]  # of the last one NVFP4 computes every value twice
# Rows from which on other tactics are taken: several CTAs a row (up to 32), CTAs of half the threads (264), two vectors
# a thread (2^17 vectors).
ROWS = [0, 1, 3, 130, 300]
MANY_GATED_ROWS = 520


def op_of(before: str, form: str) -> tuple[str, tuple[int, ...]]:
    """Name of the op and its last arguments."""
    kind, _, group = form.partition("_")
    return f"{before}_quant_{kind}", (int(group),) if group else ()


def quantised(form: str, values: Tensor) -> tuple[Tensor, ...]:
    """What the references of the quantisers make of these values."""
    if form == "mxfp4":
        return quant_mxfp4_reference(values)
    if form == "nvfp4":
        global_scale = nvfp4_row_scale_reference(values)
        return *quant_nvfp4_reference(values, global_scale), global_scale
    return quant_fp8_reference(values, int(form.removeprefix("fp8_")))


def judges(form: str, first: tuple = ()) -> tuple:
    return (*first, bits, bits, same_values) if form == "nvfp4" else (*first, bits, bits)


def gated(before: str, arguments: tuple) -> tuple:
    return (interleaved(arguments[0]), *arguments[1:]) if before == "swiglu_interleaved" else arguments


def check_norm(form: str, x: Tensor, weight: Tensor) -> None:
    name, group = op_of("rms_norm", form)
    check_kernel(name, (x, weight, EPS, *group), judges(form, (same_values,)))


def check_gated(before: str, form: str, arguments: tuple) -> None:
    name, group = op_of(before, form)
    check_kernel(name, (*gated(before, arguments), *group), judges(form))


def assert_codes_of(form: str, values: Tensor, outputs: tuple) -> None:
    for judge, actual, expected in zip(judges(form), outputs, quantised(form, values.cpu()), strict=True):
        judge(actual.cpu(), expected)


# ---- RMS norm ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_has_the_bits_of_the_reference_where_sums_are_exact(width, form):
    check_norm(form, *exact_rows(3, width))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_takes_every_dtype(dtype, weight_dtype, form):
    for width in (384, 4096, 8192):
        x, weight = exact_rows(3, width, dtype)
        check_norm(form, x, weight.to(weight_dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", ROWS)
def test_norm_of_any_number_of_rows(rows, form):
    check_norm(form, *exact_rows(rows, 1024))


@pytest.mark.parametrize("form", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("width", [32, 96, 1056])
def test_norm_of_rows_with_idle_lanes(width, form):
    check_norm(form, *exact_rows(3, width))


def test_norm_of_the_narrowest_nvfp4_row():
    check_norm("nvfp4", *exact_rows(3, 16))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_zeros_infinities_and_nan(dtype, form):
    check_norm(form, *hard_rows(384, dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [384, 4096, 7168])
def test_norm_of_random_rows_is_rms_norm_and_then_the_quantiser(width, dtype, form):
    name, group = op_of("rms_norm", form)
    x, weight = (tensor.cuda() for tensor in random_rows(40, width, dtype))
    y, *outputs = getattr(OPS, name)(x, weight, EPS, *group)
    assert_bits_equal(y, OPS.rms_norm(x, weight, EPS))
    assert_codes_of(form, y, outputs)


@pytest.mark.sanitize
@pytest.mark.parametrize("form", FORMS)
def test_norm_of_a_small_case(form):
    check_norm(form, *exact_rows(2, 384))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padding", [3, 16])
def test_norm_takes_strided_rows_that_start_anywhere(padding, form):
    x, weight = exact_rows(5, 384)
    check_norm(form, row_strided(x, padding), weight)
    check_norm(form, row_strided(x.view(5, 1, 384).expand(5, 2, 384), padding), weight)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [1536, 4096, 7168])
def test_norm_rows_do_not_depend_on_the_batch(width, form):
    """Alone, a row is shared by CTAs; with 300 rows a CTA has half the threads."""
    name, group = op_of("rms_norm", form)
    arguments = (*random_rows(300, width), EPS, *group)
    assert_rows_independent(name, arguments, batched=(0,), rows=(0, 1, 299))
    assert_rows_independent(name, (arguments[0][:130], *arguments[1:]), batched=(0,), rows=(0, 129))


def test_norm_names_what_it_cannot_take():
    x, weight = (tensor.cuda() for tensor in exact_rows(4, 128))
    y, q, scale = OPS.rms_norm_quant_fp8(x, weight, EPS, 64)
    with pytest.raises(RuntimeError, match=r"dsv4::rms_norm_quant_fp8: group must be 32, 64 or 128, is 48"):
        OPS.rms_norm_quant_fp8.out(x, weight, EPS, 48, y=y, q=q, scale=scale)
    with pytest.raises(RuntimeError, match=r"rms_norm_quant_fp8: x must be \[..., K\] with K a multiple of 128, got"):
        OPS.rms_norm_quant_fp8.out(x[:, :96], weight[:96], EPS, 128, y=y, q=q, scale=scale)
    with pytest.raises(
        RuntimeError, match=r"rms_norm_quant_fp8: scale must be contiguous \[4, 4\] uint8, got \[4, 2\]"
    ):
        OPS.rms_norm_quant_fp8.out(x, weight, EPS, 32, y=y, q=q, scale=scale)
    with pytest.raises(RuntimeError, match=r"dsv4::rms_norm_quant_mxfp4: q must be contiguous \[4, 64\] uint8"):
        OPS.rms_norm_quant_mxfp4.out(x, weight, EPS, y=y, q=q, scale=scale)
    _, q, scale, global_scale = OPS.rms_norm_quant_nvfp4(x, weight, EPS)
    with pytest.raises(RuntimeError, match=r"rms_norm_quant_nvfp4: global_scale must be contiguous \[4, 1\] float32"):
        OPS.rms_norm_quant_nvfp4.out(x, weight, EPS, y=y, q=q, scale=scale, global_scale=global_scale.flatten())


# ---- gated activation ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("before", GATED)
@pytest.mark.parametrize("inner", INNER)
def test_gated_has_the_bits_of_the_reference_where_exp_is_no_matter(inner, before, form):
    check_gated(before, form, exact_gate_up(3, inner))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("before", GATED)
@pytest.mark.parametrize("rows", [0, 1, 130])
def test_gated_of_any_number_of_rows(rows, before, form):
    for dtype in DTYPES:
        check_gated(before, form, exact_gate_up(rows, 384, dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("before", GATED)
def test_gated_of_many_rows(before, form):
    check_gated(before, form, exact_gate_up(MANY_GATED_ROWS, 2048))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("before", GATED)
@pytest.mark.parametrize("make", [random_gate_up, hard_gate_up], ids=["random", "hard"])
def test_gated_of_any_row_is_swiglu_and_then_the_quantiser(make, before, form):
    """swiglu itself is compared with its reference in test_norm.py."""
    name, group = op_of(before, form)
    for inner, dtype in ((384, F32), (384, BF16), (2048, BF16)):
        arguments = make(40, inner, dtype) if make is random_gate_up else make(inner, dtype)
        gate_up, route_weight, limit = arguments[0].cuda(), arguments[1].cuda(), arguments[2]
        h = OPS.swiglu(gate_up, route_weight, limit)
        source = gated(before, (gate_up,))[0]
        assert_codes_of(form, h, getattr(OPS, name)(source, route_weight, limit, *group))


@pytest.mark.sanitize
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("before", GATED)
def test_gated_of_a_small_case(before, form):
    check_gated(before, form, exact_gate_up(2, 384))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("before", GATED)
def test_gated_takes_strided_rows_and_leading_dimensions(before, form):
    name, group = op_of(before, form)
    gate_up, route_weight, limit = gated(before, exact_gate_up(5, 384))
    check_kernel(name, (row_strided(gate_up), route_weight, limit, *group), judges(form))
    leading = row_strided(gate_up.view(5, 1, 768).expand(5, 2, 768))
    check_kernel(name, (leading, route_weight[:, None].repeat(1, 2), limit, *group), judges(form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("before", GATED)
def test_gated_rows_do_not_depend_on_the_batch(before, form):
    name, group = op_of(before, form)
    arguments = (*gated(before, random_gate_up(MANY_GATED_ROWS, 2048)), *group)
    assert_rows_independent(name, arguments, batched=(0, 1), rows=(0, 1, 519))


@pytest.mark.parametrize("before", GATED)
def test_gated_names_what_it_cannot_take(before):
    gate_up, route_weight, limit = exact_gate_up(4, 128)
    gate_up, route_weight = gate_up.cuda(), route_weight.cuda()
    op = getattr(OPS, f"{before}_quant_fp8")
    q, scale = op(gate_up, route_weight, limit, 128)
    with pytest.raises(
        RuntimeError, match=rf"dsv4::{before}_quant_fp8: gate_up must be \[..., 2 \* I\] with I a multiple"
    ):
        op.out(gate_up[:, :192], route_weight, limit, 128, q=q, scale=scale)
    with pytest.raises(
        RuntimeError, match=rf"dsv4::{before}_quant_fp8: gate_up must be rows that start at multiples of 16"
    ):
        op(torch.zeros(4 * 256 + 1, dtype=BF16, device="cuda")[1:].view(4, 256), route_weight, limit, 128)
    with pytest.raises(RuntimeError, match=rf"dsv4::{before}_quant_fp8: q must be contiguous \[4, 128\] float8_e4m3fn"):
        op.out(gate_up, route_weight, limit, 128, q=q[:2], scale=scale)
    with pytest.raises(RuntimeError, match=rf"dsv4::{before}_quant_fp8: route_weight must be contiguous float32"):
        op.out(gate_up, route_weight.repeat(2)[::2], limit, 128, q=q, scale=scale)
