"""Kernels of the family `gemm` against fp64 products and their references."""

import pytest
import torch
from torch import Tensor

from dsv4_ops import ops
from dsv4_ops.ops.gemm import dequantise_blocks
from graph_tests.checks import assert_bits_equal, row_strided
from graph_tests.cuda.kernel_checks import assert_rows_independent, bits, check_kernel, on_cuda
from graph_tests.ops.operands import fp8_rows, fp8_weight, nvfp4
from graph_tests.ops.test_gemm import FORMATS, assert_product, every_e4m3_block, operands

pytestmark = pytest.mark.cuda

OPS = torch.ops.dsv4
BF16, F32 = torch.bfloat16, torch.float32
ROWS = (0, 1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 130)
INPUTS = {"dense": 1, "fp8": 2, "mxfp4": 2, "nvfp4": 3, "w8a16": 1}  # arguments that have a row for each token
# Widths for all paths of a kernel: several ranges of K, a last piece that is not full, rows that end inside a tile.
WIDTHS = {"dense": (200, 520), "fp8": (200, 1056), "mxfp4": (200, 1152), "nvfp4": (200, 1088), "w8a16": (200, 1040)}


def of_rows(arguments: tuple, kind: str, rows: int) -> tuple:
    return (*(a[:rows] for a in arguments[: INPUTS[kind]]), *arguments[INPUTS[kind] :])


def product_on_gpu(name: str, arguments: tuple) -> Tensor:
    return getattr(OPS, name)(*on_cuda(arguments)).cpu()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", FORMATS)
def test_linear_rounds_an_exact_sum_once(kind, rows):
    """Every sum is exact in fp32 in any order, so the bits are those of the reference."""
    n, k = WIDTHS[kind]
    arguments, _, _ = operands(kind, (rows, k), n, exact=True, group=32)
    check_kernel(f"linear_{kind}", arguments, bits)


@pytest.mark.sanitize
@pytest.mark.parametrize("rows", [3, 16, 20, 40])
@pytest.mark.parametrize("kind", FORMATS)
def test_linear_of_few_rows(kind, rows):
    arguments, x, weight = operands(kind, (rows, 512), 72)
    assert_product(product_on_gpu(f"linear_{kind}", arguments), x, weight)


@pytest.mark.sanitize
@pytest.mark.parametrize("kind", FORMATS)
def test_rows_and_scales_that_cannot_be_copied_in_pieces(kind):
    """k is no multiple of what the streaming kernels copy."""
    k = {"dense": 77, "fp8": 96, "mxfp4": 96, "nvfp4": 80, "w8a16": 72}[kind]
    arguments, x, weight = operands(kind, (5, k), 41, group=32)
    assert_product(product_on_gpu(f"linear_{kind}", arguments), x, weight)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_row_does_not_depend_on_the_batch(kind):
    arguments, _, _ = operands(kind, (64, 2048), 136)
    assert_rows_independent(f"linear_{kind}", arguments, tuple(range(INPUTS[kind])), (0, 1, 8, 17, 63))
    whole = product_on_gpu(f"linear_{kind}", arguments)
    for rows in (2, 8, 9, 15, 16, 17, 32, 33, 63):
        assert_bits_equal(product_on_gpu(f"linear_{kind}", of_rows(arguments, kind, rows)), whole[:rows])


@pytest.mark.parametrize(("n", "k"), [(1536, 4096), (4096, 8192), (7168, 16384), (65536, 1536)])
@pytest.mark.parametrize("group", [64, 128])
def test_fp8_rows_do_not_depend_on_the_batch_at_the_models_widths(n, k, group):
    """The number of rows chooses between kernels, tiles and windows of x."""
    arguments = repeated(operands("fp8", (64, k), 128, group=group)[0], "fp8", n // 128)
    whole = OPS.linear_fp8(*arguments)
    for rows in (1, 8, 16, 32):
        assert torch.equal(OPS.linear_fp8(*of_rows(arguments, "fp8", rows)), whole[:rows])


@pytest.mark.parametrize("kind", FORMATS)
def test_twenty_runs_give_the_same_bits(kind):
    arguments = on_cuda(operands(kind, (20, 4096), 1536)[0])
    runs = [getattr(OPS, f"linear_{kind}")(*arguments) for _ in range(20)]
    assert all(torch.equal(run, runs[0]) for run in runs)


def repeated(arguments: tuple, kind: str, times: int) -> tuple:
    """The arguments on the GPU, with the rows of the weight `times` times below each other."""
    device = list(on_cuda(arguments))
    for place in range(INPUTS[kind], len(device)):
        if device[place].dim() == 2:
            device[place] = device[place].view(torch.uint8).repeat(times, 1).view(device[place].dtype)
    return tuple(device)


# N, K of V4-Flash and V4-Pro: q_a with kv, q_b, wo_b.
@pytest.mark.parametrize("rows", [1, 12, 64])
@pytest.mark.parametrize(("n", "k"), [(1536, 4096), (32768, 1024), (4096, 8192), (65536, 1536), (7168, 16384)])
@pytest.mark.parametrize("kind", FORMATS)
def test_linear_of_the_models_widths(kind, n, k, rows):
    """128 rows of a weight, again and again: every repetition has the bits of the first, and that has the product."""
    arguments, x, weight = operands(kind, (rows, k), 128)
    y = getattr(OPS, f"linear_{kind}")(*repeated(arguments, kind, n // 128)).view(rows, n // 128, 128)
    assert_product(y[:, 0].cpu(), x, weight)
    assert torch.equal(y, y[:, :1].expand_as(y))


@pytest.mark.parametrize("rows", [1, 16, 17, 64])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_cta_has_several_tiles(kind, rows):
    """More rows of the weight than 132 CTAs take at a time, no two alike."""
    arguments, x, weight = operands(kind, (rows, 256), 36000, exact=True)
    expected = (x.cuda() @ weight.cuda().T).float().to(BF16).cpu()
    assert_bits_equal(product_on_gpu(f"linear_{kind}", arguments), expected)


@pytest.mark.parametrize("rows", [3, 16, 24, 40])
@pytest.mark.parametrize("kind", FORMATS)
def test_x_comes_in_windows_where_it_does_not_fit(kind, rows):
    arguments, x, weight = operands(kind, (rows, 65536), 16)
    assert_product(product_on_gpu(f"linear_{kind}", arguments), x, weight)


@pytest.mark.sanitize
@pytest.mark.parametrize("rows", [2, 33])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_fp8_rows_have_groups_of_any_size(kind, group, rows):
    arguments, x, weight = operands(kind, (rows, 640), 72, group=group)
    assert_product(product_on_gpu(f"linear_{kind}", arguments), x, weight)


@pytest.mark.parametrize("rows", [2, 33])
def test_fp8_weight_with_fp32_scales_of_blocks_that_end_early(rows):
    generator = torch.Generator().manual_seed(1)
    x, x64 = fp8_rows((rows, 320), generator, False, 64)
    weight, weight64 = fp8_weight(136, 320, generator, False, fp32_scale=True)
    assert_product(product_on_gpu("linear_fp8", (*x, *weight)), x64, weight64)


# Groups, rows of one and k: the output projections of V4-Flash and V4-Pro; a plain product with tiles of one range.
@pytest.mark.parametrize("tokens", [1, 5, 8, 9, 16, 33, 64, 200])
@pytest.mark.parametrize(("groups", "rows", "k"), [(8, 1024, 4096), (16, 1024, 4096), (1, 32768, 1024)])
def test_w8a16_has_the_bits_of_the_dense_product_with_the_converted_weight(groups, rows, k, tokens):
    generator = torch.Generator().manual_seed(4)
    some, _ = fp8_weight(1024, k, generator, False)
    x = torch.randn(tokens, groups, k, generator=generator).to(BF16)
    x, name = (x, "grouped_linear") if groups > 1 else (x[:, 0].contiguous(), "linear")
    x, weight, scale = repeated((x, *some), "w8a16", groups * rows // 1024)
    dense = dequantise_blocks(weight, scale).to(BF16)
    expected = getattr(OPS, f"{name}_dense")(x, dense)
    assert torch.equal(getattr(OPS, f"{name}_w8a16")(x, weight, scale), expected)


def test_w8a16_of_more_than_64_tokens_has_the_bits_of_its_parts():
    """Up to 192 tokens streams of 64 are faster than converting the weight for a library's product."""
    (x, *weight), _, _ = operands("w8a16", (192, 2, 2048), 128)
    whole = product_on_gpu("grouped_linear_w8a16", (x, *weight))
    parts = [product_on_gpu("grouped_linear_w8a16", (part, *weight)) for part in x.split(50)]
    assert_bits_equal(whole, torch.cat(parts))


@pytest.mark.parametrize("tokens", [8, 64, 200])
def test_w8a16_multiplies_every_code_and_scale_rounded_to_bf16(tokens):
    """Scales up to 2^118, 2^-133 for the smallest product: subnormals of bf16 as well. The rest would be infinite."""
    weight, scale, values = every_e4m3_block()
    finite = values.isfinite().all(-1)
    columns = torch.arange(tokens) % 128
    x = torch.eye(128, dtype=BF16)[columns]
    y = product_on_gpu("linear_w8a16", (x, weight, scale))
    assert torch.equal(y[:, finite], values[finite][:, columns].T)


@pytest.mark.parametrize("tokens", [8, 64, 200])
def test_a_nan_scale_of_w8a16_makes_its_rows_nan(tokens):
    (x, weight, scale), _, _ = operands("w8a16", (tokens, 256), 256)
    scale[0, 1] = 255
    y = product_on_gpu("linear_w8a16", (x, weight, scale))
    assert y[:, :128].isnan().all() and y[:, 128:].isfinite().all()


@pytest.mark.parametrize("x_global", [(1,), (6, 1)])
@pytest.mark.parametrize("weight_global", [(), (1,)])
@pytest.mark.parametrize("k", [80, 192])
def test_nvfp4_global_scales_of_tensor_and_row(x_global, weight_global, k):
    generator = torch.Generator().manual_seed(2)
    x, x64 = nvfp4((6, k), generator, False, x_global)
    weight, weight64 = nvfp4((24, k), generator, False, weight_global)
    assert_product(product_on_gpu("linear_nvfp4", (*x, *weight)), x64, weight64)


@pytest.mark.parametrize(("x_dtype", "weight_dtype"), [(F32, F32), (BF16, F32), (F32, BF16), (BF16, BF16)])
@pytest.mark.parametrize("rows", [5, 40])
def test_linear_dense_and_fp32_of_mixed_dtypes(x_dtype, weight_dtype, rows):
    (x, weight), _, _ = operands("dense", (rows, 264), 40, dtype=F32)
    x, weight = x.to(x_dtype), weight.to(weight_dtype)
    dense, fp32 = product_on_gpu("linear_dense", (x, weight)), product_on_gpu("linear_fp32", (x, weight))
    assert dense.dtype == x_dtype and fp32.dtype == F32
    assert_product(dense, x.double(), weight.double())
    assert_product(fp32, x.double(), weight.double())


@pytest.mark.parametrize(("groups", "rows_of_group"), [(3, 16), (2, 64), (8, 1024), (3, 5)])
@pytest.mark.parametrize("rows", [1, 12, 33, 66])
@pytest.mark.parametrize("kind", FORMATS)
def test_grouped_linear_is_a_loop_over_groups(kind, groups, rows_of_group, rows):
    """128-row blocks of FP8 scales straddle groups of 16, 64 and 5."""
    arguments, x, weight = operands(kind, (rows, groups, 256), groups * rows_of_group, exact=True)
    by_group = [x[:, g] @ weight[g * rows_of_group : (g + 1) * rows_of_group].T for g in range(groups)]
    y = product_on_gpu(f"grouped_linear_{kind}", arguments)
    assert_bits_equal(y, torch.cat(by_group, -1).float().to(BF16))


@pytest.mark.parametrize("kind", FORMATS)
def test_strided_rows_and_sliced_weights(kind):
    arguments, _, _ = operands(kind, (5, 512), 264, exact=True)
    check_kernel(f"linear_{kind}", tuple(row_strided(a) if a.dim() > 1 else a for a in arguments), bits)
    count = INPUTS[kind]
    rows = {132: slice(128, 260), 3: slice(1, 3), 264: slice(128, 260)}
    sliced = tuple(a[rows.get(a.shape[0], slice(None))] if a.dim() == 2 else a for a in arguments[count:])
    whole = product_on_gpu(f"linear_{kind}", arguments)
    assert_bits_equal(product_on_gpu(f"linear_{kind}", (*arguments[:count], *sliced)), whole[:, 128:260].contiguous())


@pytest.mark.parametrize("rows", [4, 20])
def test_non_finite_values_stay_in_their_row(rows):
    (x, weight), _, _ = operands("dense", (rows, 264), 40)
    x[1, 3], x[2, 5], weight[7, 5] = torch.nan, torch.inf, 0  # infinity times zero
    check_non_finite("linear_dense", (x, weight), {1: 40, 2: 1})
    arguments, _, _ = operands("fp8", (rows, 256), 40)
    arguments[0].view(torch.uint8)[1, 9] = 0x7F
    arguments[1][2, 1] = 255
    check_non_finite("linear_fp8", arguments, {1: 40, 2: 40})
    arguments, _, _ = operands("nvfp4", (rows, 256), 40)
    arguments[1].view(torch.uint8)[1, 2] = 0x7F
    arguments[2][2] = torch.nan
    check_non_finite("linear_nvfp4", arguments, {1: 40, 2: 40})


def check_non_finite(name: str, arguments: tuple, nan_counts: dict[int, int]) -> None:
    """By hand: a CPU's bf16 product may spread a NaN over its block of rows."""
    y = product_on_gpu(name, arguments)
    assert {row: int(y[row].isnan().sum()) for row in range(len(y)) if y[row].isnan().any()} == nan_counts


def test_weights_beyond_2_31_bytes():
    rows, k, n = 3, 8192, 2**18 + 256
    (x, x_scale), _ = fp8_rows((rows, k), torch.Generator().manual_seed(3), False, 128)
    weight = torch.randint(0, 0x78, (n, k), dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    scale = torch.randint(120, 130, (n // 128, k // 128), dtype=torch.uint8, device="cuda")
    y = ops.linear_fp8(x.cuda(), x_scale.cuda(), weight, scale)
    for start in (0, n // 2, n - 128):
        some = weight[start : start + 128].cpu(), scale[start // 128 : start // 128 + 1].cpu()
        expected = ops.linear_fp8(x, x_scale, *some)
        torch.testing.assert_close(y[:, start : start + 128].cpu(), expected, rtol=2.0**-7, atol=1e-3)


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_graph_replays_with_inputs_that_change(kind, rows):
    first = on_cuda(operands(kind, (rows, 512), 264)[0])
    op, count = getattr(OPS, f"linear_{kind}"), INPUTS[kind]
    op(*first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op(*first)
    for argument in first[:count]:
        argument.view(torch.uint8).copy_(argument.view(torch.uint8).flip(0))
    graph.replay()
    assert_bits_equal(y.cpu(), op(*first).cpu())


def test_wrong_arguments_are_named():
    (x, x_scale, weight, weight_scale), _, _ = operands("fp8", (20, 512), 72)
    x, x_scale, weight, weight_scale = on_cuda((x, x_scale, weight, weight_scale))
    y = torch.empty(20, 72, dtype=BF16, device="cuda")
    out = OPS.linear_fp8.out
    with pytest.raises(RuntimeError, match="dsv4::linear_fp8: workspace must be at least 5760 float32, got None"):
        out(x, x_scale, weight, weight_scale, y=y)
    with pytest.raises(RuntimeError, match="workspace must be at least 5760 float32, got"):
        out(x, x_scale, weight, weight_scale, y=y, workspace=torch.empty(10, device="cuda"))
    with pytest.raises(RuntimeError, match=r"weight must be \[\*, 512\] float8_e4m3fn"):
        out(x, x_scale, weight[:, :256], weight_scale, y=y)
    with pytest.raises(RuntimeError, match="x_scale must be .* with group 32, 64 or 128"):
        out(x, x_scale[:, :3], weight, weight_scale, y=y)
    with pytest.raises(RuntimeError, match=r"weight_scale must be \[1, 4\] uint8 or float32"):
        out(x, x_scale, weight, weight_scale[:, :2], y=y)
    with pytest.raises(RuntimeError, match=r"y must be \[..., 72\] bfloat16"):
        out(x, x_scale, weight, weight_scale, y=y.float())
    with pytest.raises(RuntimeError, match=r"y must be contiguous \[T, N\]"):
        out(x, x_scale, weight, weight_scale, y=y[:3])
    with pytest.raises(RuntimeError, match=r"weight must be \[G \* R, K\]"):
        OPS.grouped_linear_dense.out(x.new_zeros(2, 3, 8, dtype=F32), y.new_zeros(7, 8), y=y.new_zeros(2, 7))
