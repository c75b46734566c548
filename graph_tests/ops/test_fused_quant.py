"""Fused quantisers: transformers' norm and activation, rounded, then the scalar quantisers; and the op contracts."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts, DeepseekV4RMSNorm

from dsv4_ops import ops
from graph_tests import checks
from graph_tests.checks import assert_bits_equal
from graph_tests.ops import scalar

EPS, LIMIT, K = 1e-6, 10.0, 128
BATCHES = [0, 1, 2, 7, 64]
DTYPES = [torch.bfloat16, torch.float32]
LAYOUTS = [lambda x: x, checks.row_strided]
FORMS = ("fp8", "mxfp4", "nvfp4")
NAMES = [f"{before}_quant_{form}" for before in ("rms_norm", "swiglu", "swiglu_interleaved") for form in FORMS]


def rows(size: int, dtype: torch.dtype, width: int = K) -> torch.Tensor:
    """Normal rows; every seventh is zero and the ones after it large, so that groups differ."""
    x = torch.randn(size, width, generator=torch.Generator().manual_seed(size)) * 3
    x[0::7] = 0
    x[1::7] *= torch.logspace(-4, 1, width)
    return x.to(dtype)


def arguments_of(name: str, size: int, dtype: torch.dtype, layout=lambda x: x) -> tuple:
    group = (64,) if name.endswith("fp8") else ()
    generator = torch.Generator().manual_seed(9)
    if name.startswith("rms_norm"):
        return layout(rows(size, dtype)), torch.randn(K, generator=generator).to(dtype), EPS, *group
    return layout(rows(size, dtype, 2 * K)), torch.rand(size, generator=generator) + 0.1, LIMIT, *group


def interleaved(gate_up: torch.Tensor) -> torch.Tensor:
    """All gates, then all ups -> pairs (gate, up)."""
    return torch.stack(gate_up.chunk(2, dim=-1), dim=-1).flatten(-2)


def before_quantising(name: str, arguments: tuple) -> torch.Tensor:
    """transformers' norm or clamped activation (with the route weight, in fp32), rounded to the input's dtype."""
    x, second = arguments[:2]
    if name.startswith("rms_norm"):
        norm = DeepseekV4RMSNorm(K, EPS)
        norm.weight.data = second
        return norm(x).detach()
    if name.startswith("swiglu_interleaved"):
        x = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
    experts = SimpleNamespace(limit=LIMIT, act_fn=torch.nn.SiLU())
    return (DeepseekV4Experts._apply_gate(experts, x.float()) * second[:, None]).to(x.dtype)


def quantised(name: str, y: torch.Tensor) -> list[list]:
    """[codes, scales] or [codes, scales, global scales] of every row of y."""
    values = y.float().tolist()
    if name.endswith("mxfp4"):
        return list(zip(*(scalar.quant_mxfp4(row) for row in values), strict=True))
    if name.endswith("nvfp4"):
        scales = [scalar.nvfp4_global_scale(row) for row in values]
        parts = [(*scalar.quant_nvfp4(row, scale), [scale]) for row, scale in zip(values, scales, strict=True)]
        return list(zip(*parts, strict=True))
    return list(zip(*(scalar.quant_fp8(row, 64) for row in values), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_quantises_the_rounded_rows_of_transformers(name, dtype):
    arguments = arguments_of(name, 9, dtype)
    y = before_quantising(name, arguments)
    outputs = list(getattr(ops, name)(*arguments))
    if name.startswith("rms_norm"):
        assert_bits_equal(outputs.pop(0), y)
    for output, expected in zip(outputs, quantised(name, y), strict=True):
        if output.dtype == torch.float32:
            assert_bits_equal(output, torch.tensor(expected))
        else:
            assert_bits_equal(output.view(torch.uint8), torch.tensor(expected, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_interleaved_pairs_give_what_halves_give(form, dtype):
    gate_up, *rest = arguments_of(f"swiglu_quant_{form}", 7, dtype)
    pairs = interleaved(gate_up).view(7, 1, -1)
    route_weight, *scalars = rest
    results = getattr(ops, f"swiglu_interleaved_quant_{form}")(pairs, route_weight[:, None], *scalars)
    for actual, expected in zip(results, getattr(ops, f"swiglu_quant_{form}")(gate_up, *rest), strict=True):
        assert_bits_equal(actual[:, 0], expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_its_batch(name):
    arguments = arguments_of(name, 7, torch.bfloat16)
    per_row = name.startswith("swiglu")  # the second argument is one weight a row
    for row in range(7):
        alone = (arguments[0][row : row + 1], arguments[1][row : row + 1] if per_row else arguments[1], *arguments[2:])
        for many, one in zip(getattr(ops, name)(*arguments), getattr(ops, name)(*alone), strict=True):
            assert_bits_equal(many[row : row + 1], one)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "row_strided"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_op_contract(name, size, dtype, layout):
    checks.check_op(name, arguments_of(name, size, dtype, layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_strided_rows_give_the_same_bits(name, dtype):
    x, *rest = arguments_of(name, 7, dtype)
    for strided in (checks.row_strided(x), x.t().contiguous().t()):
        for actual, expected in zip(getattr(ops, name)(strided, *rest), getattr(ops, name)(x, *rest), strict=True):
            assert actual.is_contiguous()
            assert_bits_equal(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_no_guard_on_the_batch(name):
    checks.check_symbolic_batch(name, lambda size: arguments_of(name, size, torch.bfloat16))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    checks.opcheck(name, arguments_of(name, 3, torch.bfloat16))


@pytest.mark.parametrize("name", NAMES)
def test_refuses_rows_that_are_not_whole_groups(name):
    width = 40 if name.startswith("rms_norm") else 80
    second = torch.zeros(40) if name.startswith("rms_norm") else torch.zeros(2)
    with pytest.raises(ValueError, match=rf"dsv4::{name}: .* multiple of \d+, got \[2, 40\]"):
        getattr(ops, name)(torch.zeros(2, width), second, 1.0, *((64,) if name.endswith("fp8") else ()))
