"""Products of more than 64 tokens, by libraries and the experts' kernels where they serve, against fp64 products.

FP8 through cuBLASLt: wgmma adds the 32 products of an instruction and the accumulator as fixed-point numbers that keep
13 bits below the largest of them, and the accumulator is added to fp32 after each block of 128, whose scales differ. An
instruction so loses less than 33 * 2^-13 of its largest term, which sum|x w| of the block bounds, and a block has 4:

    |error| <= 4 * 33 * 2^-13 * sum|x w|, then one rounding to bf16 (2^-8)

That is the worst case. On random operands errors cancel: the result as a whole may be no farther from the exact one
than three times what rounding to bf16 alone does.
"""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from graph_tests.checks import assert_bits_equal
from graph_tests.cuda.kernel_checks import NEEDS_HOPPER, on_cuda
from graph_tests.ops.operands import fp8_rows, fp8_weight
from graph_tests.ops.test_gemm import FORMATS, operands

pytestmark = pytest.mark.cuda

OPS = torch.ops.dsv4
BF16 = torch.bfloat16
TOKENS = (65, 128, 1000, 4096)
ROUNDING = 2.0**-8
FP8_LOSS = 4 * 33 * 2.0**-13


def fp8_arguments(shape: tuple, n: int, *, fp32_scale: bool = False) -> tuple[tuple, Tensor, Tensor]:
    """Arguments with scales 2^-17 to 2^12, or fp32 ones of the weight, and the operands in fp64, all on the GPU."""
    generator = torch.Generator().manual_seed(5)
    (x, x_scale), x64 = fp8_rows(shape, generator, False, 128)
    (weight, scale), weight64 = fp8_weight(n, shape[-1], generator, False, fp32_scale=fp32_scale)
    arguments = on_cuda((x, x_scale, weight, scale))
    return arguments, x64.cuda(), weight64.cuda()


def exact_product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """[..., N] in fp64: the product, and the sum of the magnitudes of its terms."""
    if x.dim() == 2:
        return x @ weight.mT, x.abs() @ weight.abs().mT
    by_group = weight.unflatten(0, (x.shape[1], -1))
    pairs = ((x, by_group), (x.abs(), by_group.abs()))
    return tuple(torch.einsum("tgk,grk->tgr", a, b).flatten(1) for a, b in pairs)


def assert_fp8(y: Tensor, x: Tensor, weight: Tensor) -> None:
    exact, size = exact_product(x, weight)
    error = y.double() - exact
    assert y.dtype == BF16 and (error.abs() <= FP8_LOSS * size * (1 + ROUNDING) + ROUNDING * exact.abs()).all()
    of_rounding = (exact.to(BF16).double() - exact).norm()
    assert error.norm() <= 3 * of_rounding, f"{float(error.norm() / of_rounding):.2f} times that of rounding"


def assert_fp32_sum(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """fp32 accumulation in any order; what is bf16 is rounded once, or, where K is split, its parts are as well."""
    exact, size = exact_product(x, weight)
    rounding = ROUNDING if y.dtype == BF16 else 0
    bound = (x.shape[-1] + 2) * 2.0**-24 * size * (1 + rounding) + 2 * rounding * exact.abs()
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("n", "k"), [(1536, 4096), (4096, 1024), (512, 1536)])
def test_linear_fp8(n, k, tokens):
    arguments, x, weight = fp8_arguments((tokens, k), n)
    assert_fp8(OPS.linear_fp8(*arguments), x, weight)


@pytest.mark.parametrize("tokens", [65, 1000])
def test_linear_fp8_with_fp32_scales(tokens):
    arguments, x, weight = fp8_arguments((tokens, 1024), 640, fp32_scale=True)
    assert_fp8(OPS.linear_fp8(*arguments), x, weight)


@pytest.mark.parametrize(("n", "k"), [(200, 1024), (256, 384), (256, 1056)])
def test_fp8_widths_that_the_library_does_not_take(n, k):
    """Rows or columns that are no whole blocks, or no multiple of four of them."""
    (x, x_scale, weight, scale), x64, weight64 = operands("fp8", (130, k), n, group=32)
    y = OPS.linear_fp8(*on_cuda((x, x_scale, weight, scale)))
    assert_fp32_sum(y, x64.cuda(), weight64.cuda())


@pytest.mark.parametrize("tokens", (100, 512, 1000))
def test_grouped_linear_fp8(tokens):
    arguments, x, weight = fp8_arguments((tokens, 3, 512), 3 * 256)
    assert_fp8(OPS.grouped_linear_fp8(*arguments), x, weight)


@pytest.mark.parametrize("tokens", TOKENS)
def test_linear_dense_and_fp32(tokens):
    (x, weight), x64, weight64 = operands("dense", (tokens, 1024), 520)
    x, weight, x64, weight64 = (tensor.cuda() for tensor in (x, weight, x64, weight64))
    assert_fp32_sum(OPS.linear_dense(x, weight), x64, weight64)
    assert_fp32_sum(OPS.linear_fp32(x, weight), x64, weight64)


@pytest.mark.parametrize("tokens", (65, 200, 1000))
def test_w8a16(tokens):
    """A converted weight, bits and all; test_gemm.py compares them with those of the dense product."""
    arguments, x, weight = operands("w8a16", (tokens, 1040), 200)
    assert_fp32_sum(OPS.linear_w8a16(*on_cuda(arguments)), x.cuda(), weight.cuda())
    arguments, x, weight = operands("w8a16", (tokens, 3, 512), 3 * 128)
    assert_fp32_sum(OPS.grouped_linear_w8a16(*on_cuda(arguments)), x.cuda(), weight.cuda())


@pytest.mark.sanitize
@pytest.mark.library
def test_w8a16_of_many_tokens_converts_rows_longer_than_a_cta():
    arguments, x, weight = operands("w8a16", (200, 4096 + 48), 24)
    assert_fp32_sum(OPS.linear_w8a16(*on_cuda(arguments)), x.cuda(), weight.cuda())


@pytest.mark.parametrize("tokens", (65, 1000))
def test_grouped_linear_dense(tokens):
    (x, weight), x64, weight64 = operands("dense", (tokens, 3, 512), 3 * 128)
    y = OPS.grouped_linear_dense(x.cuda(), weight.cuda())
    assert_fp32_sum(y, x64.cuda(), weight64.cuda())


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_linear_fp4(kind, tokens):
    arguments, x, weight = operands(kind, (tokens, 512), 384, group=128)
    y = getattr(OPS, f"linear_{kind}")(*on_cuda(arguments))
    assert_fp32_sum(y, x.cuda(), weight.cuda())


def test_fp32_operands_stay_fp32():
    """No tensor core: the exact mode of the model."""
    (x, weight), x64, weight64 = operands("dense", (100, 512), 128, dtype=torch.float32)
    y = OPS.linear_dense(x.cuda(), weight.cuda())
    assert y.dtype == torch.float32
    assert_fp32_sum(y, x64.cuda(), weight64.cuda())


def test_rows_that_are_views():
    """Of a joined product: every row at the distance of a longer one."""
    arguments, x, weight = fp8_arguments((200, 1024), 256)
    wide = torch.zeros(200, 1536, dtype=torch.uint8, device="cuda")
    wide[:, 512:].copy_(arguments[0].view(torch.uint8))
    scales = torch.zeros(200, 12, dtype=torch.uint8, device="cuda")
    scales[:, 4:].copy_(arguments[1])
    views = wide.view(torch.float8_e4m3fn)[:, 512:], scales[:, 4:]
    assert_bits_equal(OPS.linear_fp8(*views, *arguments[2:]).cpu(), OPS.linear_fp8(*arguments).cpu())


@pytest.mark.parametrize("tokens", (65, 1000))
@pytest.mark.parametrize("kind", FORMATS)
def test_runs_and_replays_give_the_same_bits(kind, tokens):
    """Twenty runs, and a graph whose inputs change between replays."""
    arguments = on_cuda(operands(kind, (tokens, 1024), 384, group=128)[0])
    op = getattr(OPS, f"linear_{kind}")
    expected = op(*arguments)
    assert all(torch.equal(op(*arguments), expected) for _ in range(19))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        op(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op(*arguments)
    graph.replay()
    assert_bits_equal(y.cpu(), expected.cpu())
    for argument in arguments[:2]:
        if argument.shape[0] == tokens:
            argument.view(torch.uint8).copy_(argument.view(torch.uint8).flip(0))
    torch.cuda.synchronize()
    graph.replay()
    assert_bits_equal(y.cpu(), op(*arguments).cpu())


# The argument and the byte that make a token NaN.
SPOILT = {"dense": (0, 0xFF), "fp8": (1, 0xFF), "mxfp4": (1, 0xFF), "nvfp4": (1, 0x7F), "w8a16": (0, 0xFF)}


@pytest.mark.parametrize("kind", FORMATS)
def test_no_token_reads_another(kind):
    """A token of NaN leaves the others' bits alone, in the library's part and in the rest."""
    arguments = list(on_cuda(operands(kind, (71, 512), 128, group=128)[0]))
    op = getattr(OPS, f"linear_{kind}")
    expected = op(*arguments)
    spoilt, byte = SPOILT[kind]
    for token in (3, 70):
        arguments[spoilt].view(torch.uint8)[token] = byte
    torch.cuda.synchronize()
    y = op(*arguments)
    others = [token for token in range(71) if token not in (3, 70)]
    assert y[[3, 70]].isnan().all() and torch.equal(y[others], expected[others])


@NEEDS_HOPPER
def test_library_kernels_serve_the_models_widths():
    """Otherwise a prompt would be streamed 64 tokens at a time: correct, and 60 times the weights."""

    def kernels(call) -> list[str]:
        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            call()
            torch.cuda.synchronize()
        return [event.name for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA]

    fp8, _, _ = fp8_arguments((4096, 1024), 4096)
    names = kernels(lambda: OPS.linear_fp8(*fp8))
    assert len(names) <= 4 and sum("dsv4" in name for name in names) == 1, names  # the scales; a library may split K
    x, weight = torch.randn(4096, 1024, device="cuda").to(BF16), torch.randn(512, 1024, device="cuda").to(BF16)
    for op in (OPS.linear_dense, OPS.linear_fp32):
        names = kernels(lambda op=op: op(x, weight))
        assert names and not any("dsv4" in name for name in names), names
