"""Hyper-connections fused with a quantiser: the equations of transformers, then the scalar quantisers; contracts."""

import pytest
import torch

from dsv4_ops import ops
from dsv4_ops.registry import TABLE
from graph_tests import checks
from graph_tests.ops import scalar
from graph_tests.ops.hyper_connection_cases import NAMES as ALL_NAMES
from graph_tests.ops.hyper_connection_cases import NORM_EPS, arguments_of
from graph_tests.ops.test_hyper_connection import TOLERANCE, largest_ratio, post_fp64, transformers_pre

DIM, GROUP = 64, 32  # what arguments_of takes where it is not told
NAMES = [name for name in ALL_NAMES if "quant" in name]
DTYPES = [torch.float32, torch.bfloat16]
ROWS = ((0,), (1,), (7,), (2, 3), (0, 3), (3, 0))


def quantised(name: str, y: torch.Tensor) -> list[list]:
    """[codes, scales] or [codes, scales, global scales] of every row of y, by the definition."""
    values = y.float().tolist()
    if name.endswith("fp8"):
        return list(zip(*(scalar.quant_fp8(row, GROUP) for row in values), strict=True))
    scales = [scalar.nvfp4_global_scale(row) for row in values]
    parts = [(*scalar.quant_nvfp4(row, scale), [scale]) for row, scale in zip(values, scales, strict=True)]
    return list(zip(*parts, strict=True))


@pytest.mark.parametrize("n", (2, 4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_is_the_mix_of_transformers_then_the_scalar_quantiser(name, dtype, n):
    """The judge computes in fp32 or fp64 from the streams as they are rounded; codes and scales from the y returned."""
    arguments = arguments_of(name, (7,), n, dtype=dtype)
    results = list(getattr(ops, name)(*arguments))
    half_ulp = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    x, first = arguments[0], 1
    if "post_pre" in name:
        x, first = results.pop(0), 4
        assert checks.relative_error(x, post_fp64(*arguments[:4])) < half_ulp + TOLERANCE
    fn, scale, base, norm_weight = arguments[first : first + 4]
    y, post, comb, *codes = results
    y_judge, post_judge, comb_judge = transformers_pre(x.float(), fn, scale, base)
    y_judge = y_judge.to(dtype).double()
    y_judge = y_judge * (y_judge.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt() * norm_weight.double()
    assert checks.relative_error(y, y_judge) < 2 * half_ulp + TOLERANCE
    assert checks.relative_error(post, post_judge) < TOLERANCE and largest_ratio(comb, comb_judge) < 4e-5
    for result, expected in zip(codes, quantised(name, y), strict=True):
        if result.dtype == torch.float32:
            checks.assert_bits_equal(result, torch.tensor(expected))
        else:
            checks.assert_bits_equal(result.view(torch.uint8), torch.tensor(expected, dtype=torch.uint8))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_op_contract(name, rows):
    for n in (1, 4):
        for dtype in DTYPES:
            for layout in (lambda tensor: tensor, checks.row_strided):
                checks.check_op(name, arguments_of(name, rows, n, dtype=dtype, layout=layout))


@pytest.mark.parametrize("name", NAMES)
def test_fake_does_not_specialise_on_the_batch(name):
    checks.check_symbolic_batch(name, lambda batch: arguments_of(name, (batch, 3)))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    checks.opcheck(name, arguments_of(name, (3,)))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_are_refused_by_name(name):
    arguments = list(arguments_of(name, (2,)))
    norm_weight = 7 if "post_pre" in name else 4
    wrong = arguments[:norm_weight] + [torch.zeros(DIM + 1)] + arguments[norm_weight + 1 :]
    with pytest.raises(ValueError, match=rf"dsv4::{name}: norm_weight must be \[{DIM}\]"):
        getattr(ops, name)(*wrong)
    if name.endswith("fp8"):
        with pytest.raises(ValueError, match=rf"dsv4::{name}: x must be .* multiple of 128"):
            getattr(ops, name)(*arguments[:-1], 128)


@pytest.mark.parametrize("tokens", (1, 2047, 2048, 5000))
def test_partial_sums_shrink_where_there_are_many_tokens(tokens):
    """From 2048 tokens on the first launch adds up 8 partial sums itself; the kernels refuse a smaller workspace."""
    x = torch.empty(tokens, 4, 1000, device="meta")
    workspace = TABLE["hc_pre"].workspace(x, torch.empty(24, 4000, device="meta"))
    assert workspace.shape == (tokens * (2 if tokens >= 2048 else 16) * 28,) and workspace.dtype == torch.float32
