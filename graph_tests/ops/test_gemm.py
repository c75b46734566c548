"""Matrix products against fp64 products of operands whose values come from the format definitions."""

import pytest
import torch

from dsv4_ops.ops.gemm import dequantise_blocks
from graph_tests import checks
from graph_tests.ops.operands import E4M3, E4M3_CODES, fp8_rows, fp8_weight, mxfp4_weight, nvfp4

OPS = torch.ops.dsv4
F32, BF16 = torch.float32, torch.bfloat16
FORMATS = ["dense", "fp8", "mxfp4", "nvfp4", "w8a16"]
GROUPED_SHAPES = [
    (2, 128),
    (3, 64),
    (8, 16),
]  # groups, rows of a group: 128-row scale blocks straddle groups of 64 and 16


def operands(kind: str, x_shape: tuple, n: int, *, exact: bool = False, group: int = 64, dtype: torch.dtype = BF16):
    """Arguments of linear_<kind> and both operands in fp64."""
    generator = torch.Generator().manual_seed(0)
    k = x_shape[-1]
    if kind == "dense":
        values = [torch.randn(shape, generator=generator) * (4 if exact else 1) for shape in (x_shape, (n, k))]
        x, weight = (value.round().to(dtype) if exact else value.to(dtype) for value in values)
        return (x, weight), x.double(), weight.double()
    if kind == "w8a16":
        (x, _), x64, _ = operands("dense", x_shape, 1, exact=exact)
        weight, weight64 = fp8_weight(n, k, generator, exact)
        return (x, *weight), x64, weight64
    if kind == "nvfp4":
        (x, x64) = nvfp4(x_shape, generator, exact, (*x_shape[:-1], 1))
        (weight, weight64) = nvfp4((n, k), generator, exact, (1,))
        return (*x, *weight), x64, weight64
    x, x64 = fp8_rows(x_shape, generator, exact, group)
    weight, weight64 = (fp8_weight if kind == "fp8" else mxfp4_weight)(n, k, generator, exact)
    return (*x, *weight), x64, weight64


def assert_product(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """|error| <= (K + 2) * 2^-24 * sum|x w| of the fp32 sum and of fp32 scales, and one rounding to bf16 (2^-8)."""
    exact, size = x @ weight.mT, x.abs() @ weight.abs().mT
    rounding = 2.0**-8 if y.dtype == BF16 else 0
    bound = (x.shape[-1] + 2) * 2.0**-24 * size * (1 + rounding) + rounding * exact.abs()
    assert y.shape == exact.shape and ((y.double() - exact).abs() <= bound).all()


def grouped_operands(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, G, K] and [G*R, K] as [G, T, K] and [G, R, K]."""
    return x.transpose(0, 1), weight.view(x.shape[1], -1, x.shape[2])


@pytest.mark.parametrize("kind", FORMATS)
def test_linear_rounds_an_exact_sum_once(kind):
    """Every sum is exact in fp32, so the bits are those of the fp64 product rounded to bf16."""
    arguments, x, weight = operands(kind, (7, 192), 200, exact=True)
    checks.assert_bits_equal(getattr(OPS, f"linear_{kind}")(*arguments), (x @ weight.T).float().to(BF16))


@pytest.mark.parametrize("kind", FORMATS)
def test_grouped_linear_rounds_an_exact_sum_once(kind):
    arguments, x, weight = operands(kind, (5, 3, 192), 3 * 64, exact=True)
    expected = torch.bmm(*(lambda a, b: (a, b.mT))(*grouped_operands(x, weight))).transpose(0, 1).flatten(1)
    checks.assert_bits_equal(getattr(OPS, f"grouped_linear_{kind}")(*arguments), expected.float().to(BF16))


@pytest.mark.parametrize(("n", "k"), [(128, 128), (200, 256), (1, 192), (129, 64), (300, 32)])
@pytest.mark.parametrize("kind", FORMATS)
def test_linear(kind, n, k):
    arguments, x, weight = operands(kind, (6, k), n, group=32 if k == 32 else 64)
    y = getattr(OPS, f"linear_{kind}")(*arguments)
    assert y.dtype == BF16
    assert_product(y, x, weight)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_fp8_rows_have_groups_of_any_size(group):
    arguments, x, weight = operands("fp8", (6, 256), 72, group=group)
    assert_product(OPS.linear_fp8(*arguments), x, weight)


def test_fp8_weight_with_fp32_scales():
    generator = torch.Generator().manual_seed(1)
    x, x64 = fp8_rows((6, 320), generator, False, 64)
    weight, weight64 = fp8_weight(136, 320, generator, False, fp32_scale=True)
    assert_product(OPS.linear_fp8(*x, *weight), x64, weight64)


def every_e4m3_block() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight [128 * 255, 128] with every finite code under every scale but NaN, and its values in bf16."""
    codes = torch.tensor(E4M3_CODES, dtype=torch.uint8).repeat(65)[: 128 * 128].view(128, 128)
    scale = torch.arange(255, dtype=torch.uint8)
    values = E4M3[codes.long()] * 2.0 ** (scale.double().view(-1, 1, 1) - 127)
    return codes.repeat(255, 1).view(torch.float8_e4m3fn), scale[:, None], values.flatten(0, 1).to(BF16)


def test_w8a16_multiplies_the_weight_rounded_to_bf16():
    """Exact but for scales that make values infinite, or too small for bf16: those are rounded once."""
    weight, scale, values = every_e4m3_block()
    assert torch.equal(dequantise_blocks(weight, scale).to(BF16), values)
    rows = values.isfinite().all(-1) & (values.abs() >= 2.0**-126).logical_or(values == 0).all(-1)
    y = OPS.linear_w8a16(torch.eye(128, dtype=BF16), weight, scale)  # a CPU's products of bf16 know no subnormals
    assert rows.sum() > 128 * 200 and torch.equal(y[:, rows], values[rows].T)


@pytest.mark.parametrize("x_global", [(1,), (6, 1)])
@pytest.mark.parametrize("weight_global", [(), (1,)])
def test_nvfp4_global_scales_of_tensor_and_row(x_global, weight_global):
    generator = torch.Generator().manual_seed(2)
    x, x64 = nvfp4((6, 64), generator, False, x_global)
    weight, weight64 = nvfp4((24, 64), generator, False, weight_global)
    assert_product(OPS.linear_nvfp4(*x, *weight), x64, weight64)


@pytest.mark.parametrize(("x_dtype", "weight_dtype"), [(F32, F32), (BF16, F32), (F32, BF16)])
def test_linear_dense_and_fp32_of_mixed_dtypes(x_dtype, weight_dtype):
    (x, weight), _, _ = operands("dense", (6, 96), 40, dtype=F32)
    x, weight = x.to(x_dtype), weight.to(weight_dtype)
    dense, fp32 = OPS.linear_dense(x, weight), OPS.linear_fp32(x, weight)
    assert dense.dtype == x_dtype and fp32.dtype == F32
    assert_product(dense, x.double(), weight.double())
    assert_product(fp32, x.double(), weight.double())


@pytest.mark.parametrize(("groups", "rows"), GROUPED_SHAPES)
@pytest.mark.parametrize("kind", FORMATS)
def test_grouped_linear_is_a_loop_over_groups(kind, groups, rows):
    arguments, x, weight = operands(kind, (6, groups, 96), groups * rows, group=32)
    y = getattr(OPS, f"grouped_linear_{kind}")(*arguments).view(6, groups, rows)
    for group in range(groups):
        assert_product(y[:, group], x[:, group], weight[group * rows : (group + 1) * rows])


@pytest.mark.parametrize("kind", FORMATS)
def test_leading_dimensions_are_rows(kind):
    for name, shape in (("linear", (2, 3, 64)), ("grouped_linear", (2, 3, 4, 64))):
        arguments, _, _ = operands(kind, shape, 32)
        inputs = {"dense": 1, "fp8": 2, "mxfp4": 2, "nvfp4": 3, "w8a16": 1}[kind]
        flat = tuple(a.flatten(0, 1) for a in arguments[:inputs])
        op = getattr(OPS, f"{name}_{kind}")
        checks.assert_bits_equal(op(*arguments), op(*flat, *arguments[inputs:]).unflatten(0, (2, 3)))


def all_ops(rows: int):
    """(name, arguments) of every op with `rows` rows of x."""
    for kind in FORMATS:
        yield f"linear_{kind}", operands(kind, (rows, 64), 40)[0]
        yield f"grouped_linear_{kind}", operands(kind, (rows, 4, 64), 32)[0]
    yield "linear_fp32", operands("dense", (rows, 64), 40)[0]
    yield "linear_dense", operands("dense", (rows, 64), 40, dtype=F32)[0]


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 64])
def test_contract(rows):
    for name, arguments in all_ops(rows):
        checks.check_op(name, arguments)
        op = getattr(OPS, name)
        strided = tuple(checks.row_strided(a) if a.dim() > 1 else a for a in arguments)
        checks.check_op(name, strided)
        checks.assert_bits_equal(op(*strided), op(*arguments))


def test_no_guard_on_the_batch():
    names = [name for name, _ in all_ops(1)]
    for name in names:
        checks.check_symbolic_batch(name, lambda batch, name=name: dict(all_ops(batch))[name])


@pytest.mark.parametrize("name", sorted({name for name, _ in all_ops(1)}))
def test_opcheck(name):
    checks.opcheck(name, dict(all_ops(3))[name])


def test_wrong_arguments_are_named():
    (x, x_scale, weight, weight_scale), _, _ = operands("fp8", (3, 256), 200)
    with pytest.raises(ValueError, match="weight_scale \\[2, 2\\] uint8 or float32"):
        OPS.linear_fp8(x, x_scale, weight, weight_scale[:1])
    with pytest.raises(ValueError, match="x_scale \\[T, K/group\\]"):
        OPS.linear_fp8(x, x_scale[:, :3], weight, weight_scale)
    with pytest.raises(ValueError, match="weight must be \\[N, 256\\]"):
        OPS.linear_dense(torch.zeros(3, 256), torch.zeros(5, 128))
    with pytest.raises(ValueError, match="weight_scale must be uint8, powers of two, got \\[2, 2\\] float32"):
        OPS.linear_w8a16(torch.zeros(3, 256, dtype=BF16), weight, torch.ones(2, 2))
    with pytest.raises(ValueError, match="weight \\[G\\*R, K\\]"):
        OPS.grouped_linear_dense(torch.zeros(3, 4, 8), torch.zeros(6, 8))
    (packed, scale, x_global, *weight), _, _ = operands("nvfp4", (3, 64), 8)
    with pytest.raises(ValueError, match="x must be \\[..., K/2\\] uint8 with x_scale"):
        OPS.linear_nvfp4(packed, scale.view(torch.uint8), x_global, *weight)
    with pytest.raises(ValueError, match="weight_global must be"):
        OPS.linear_nvfp4(packed, scale, x_global, *weight[:2], torch.ones(8))
