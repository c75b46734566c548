"""Kernels of the family `hyper_connection` against their references.

Streams are bit-equal: their sums have four terms and one order. What comes out of a product of n * dim terms is not:
torch and the kernels add in other orders, and a tensor core cuts off where the CPU rounds. With 28672 terms that moves
a logit by about 1e-6, and by as much, relatively, what comes out of its sigmoid. An element of comb is a quotient of
exponentials of logits of a size of up to 8, passed through 39 normalisations.
"""

import pytest
import torch

from dsv4_ops import ops
from dsv4_ops.registry import TABLE
from graph_tests.checks import assert_bits_equal, row_strided
from graph_tests.cuda.kernel_checks import assert_rows_independent, bits, check_kernel, close, on_cuda
from graph_tests.ops.hyper_connection_cases import NAMES, arguments_of, random

pytestmark = pytest.mark.cuda

FLASH, PRO = 4096, 7168
BF16, FP32 = torch.bfloat16, torch.float32
PRE_NAMES = [name for name in NAMES if name not in ("sinkhorn", "hc_post")]
QUANTISED = [name for name in NAMES if "quant" in name]
POST, COMB = close(2e-5), close(5e-5)


def rounded(dtype: torch.dtype):
    """For y: fp32 within the error of pre; bf16 mostly the same bits, or a step of the sum and one of the norm away."""
    if dtype == FP32:
        return close(5e-5, 5e-5)

    def compare(actual: torch.Tensor, expected: torch.Tensor) -> None:
        close(2.0**-6, 1e-4)(actual, expected)
        assert_most(actual, expected, 0.01)

    return compare


def assert_most(actual: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    """Codes and scales follow y: where it has other bits they may differ, nowhere else. See the test of own y."""
    if actual.numel():
        left, right = (tensor.contiguous().view(torch.uint8) for tensor in (actual, expected))
        different = float((left != right).double().mean())
        assert different <= share, f"{different:.2%} of the bytes differ, allowed {share:.2%}"


def most(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert_most(actual, expected, 0.02)


def anything(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype


def judges(name: str, dtype: torch.dtype) -> tuple:
    """One for each output. Codes of an fp32 row follow its last bits, so only the test of own y can judge them."""
    of_output = {
        "streams": bits,
        "y": bits if name == "hc_post" else rounded(dtype),
        "q": most if dtype == BF16 else anything,
        "q_scale": most if dtype == BF16 else anything,
        "global_scale": close(2.0**-6 if dtype == BF16 else 5e-5),
        **{output: POST for output in ("post", "post_next")},
        **{output: COMB for output in ("comb", "comb_next")},
    }
    return tuple(of_output[output] for output in TABLE[name].outputs)


def check(name: str, rows: tuple[int, ...], dtype: torch.dtype = BF16, **options) -> None:
    check_kernel(name, arguments_of(name, rows, dtype=dtype, **options), judges(name, dtype))


def rows_of(name: str, arguments: tuple) -> tuple[int, ...]:
    """Places of arguments that have a row for each token."""
    return tuple(range(4)) if "post" in name else (0,)


@pytest.mark.parametrize("tokens", [0, 1, 3, 130])
@pytest.mark.parametrize("name", NAMES)
def test_widths_of_v4_flash(name, tokens):
    check(name, (tokens,), dim=FLASH, group=128)


@pytest.mark.parametrize("name", NAMES)
def test_widths_of_v4_pro(name):
    check(name, (18,), dim=PRO, group=128, norm_dtype=FP32)


@pytest.mark.sanitize
@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_small_case(name, n):
    check(name, (5,), BF16, n=n, dim=128, norm_dtype=FP32)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_streams(name, n, dtype):
    check(name, (3,), dtype, n=n, dim=96, norm_dtype=BF16)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("dim", [1, 7, 100])
@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in QUANTISED])
def test_rows_that_are_not_whole_vectors(name, n, dim, dtype):
    check(name, (2, 3), dtype, n=n, dim=dim)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", ["hc_pre", "hc_post_pre_rms_norm", *QUANTISED])
def test_rows_that_do_not_fit_in_the_registers_of_a_cta(name, dtype):
    check(name, (2,), dtype, dim=8192 + 128)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_streams_at_a_distance(name, n, dtype):
    """Rows of f, x and logits may lie apart; post and comb are small and have to be contiguous."""
    arguments = list(arguments_of(name, (5,), n=n, dim=160, dtype=dtype))
    for place in rows_of(name, tuple(arguments)):
        if place < 2:
            arguments[place] = row_strided(arguments[place])
    check_kernel(name, tuple(arguments), judges(name, dtype))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("name", [name for name in QUANTISED if name.endswith("fp8")])
def test_groups_of_fp8(name, group):
    check(name, (3,), dim=384, group=group)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", QUANTISED)
def test_codes_are_those_of_the_returned_row(name, n, dtype):
    arguments = arguments_of(name, (33,), n=n, dim=1024, dtype=dtype, group=64)
    result = dict(zip(TABLE[name].outputs, getattr(ops, name)(*on_cuda(arguments)), strict=True))
    y = result["y"].cpu()
    if name.endswith("fp8"):
        expected = dict(zip(("q", "q_scale"), ops.quant_fp8(y, 64), strict=True))
    else:
        row_scale = ops.nvfp4_row_scale(y)
        q, scale = ops.quant_nvfp4(y, row_scale)
        expected = {"q": q, "q_scale": scale, "global_scale": row_scale}
    for output, wanted in expected.items():
        bits(result[output].cpu(), wanted)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", QUANTISED)
def test_a_sum_that_is_exact_gives_the_bits_of_the_reference(name, n):
    """pre is 1/2, streams are even integers: the weighted sum and its sum of squares have one value in any order."""
    arguments = list(arguments_of(name, (19,), n=n, dim=512, dtype=BF16))
    at = 4 if "post_pre" in name else 1
    x = (2 * torch.randint(-4, 5, (19, n, 512), generator=torch.Generator().manual_seed(3))).bfloat16()
    if at == 4:  # new streams = old streams
        arguments[0], arguments[2] = torch.zeros_like(arguments[0]), torch.zeros_like(arguments[2])
        arguments[3] = torch.eye(n).repeat(19, 1, 1)
    arguments[at - 1 if at == 1 else 1] = x
    arguments[at] = torch.zeros_like(arguments[at])
    arguments[at + 2] = torch.zeros_like(arguments[at + 2])
    arguments[at + 5] = 0.0  # hc_eps
    exact = {"streams", "y", "q", "q_scale", "global_scale"}
    check_kernel(name, tuple(arguments), tuple(bits if output in exact else POST for output in TABLE[name].outputs))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("tokens", [20, 2100])
def test_products_of_integers_are_exact(tokens, dtype):
    """Sums of products of small integers have no rounding in fp32, so only exp and the reciprocals may differ: a part
    of fn or of x that is dropped, or multiplied with the wrong one, is seen at once."""
    x, fn, scale, base, *scalars = arguments_of("hc_pre", (tokens,), dim=256, dtype=dtype)
    generator = torch.Generator().manual_seed(4)
    x = torch.randint(-3, 4, x.shape, generator=generator).to(dtype)
    if dtype == FP32:
        x = x + torch.randint(-1, 2, x.shape, generator=generator) * 2.0**-9  # more bits than one bf16 part has
    fn = (
        torch.randint(-1, 2, fn.shape, generator=generator)
        + torch.randint(-1, 2, fn.shape, generator=generator) / 1024.0
    )
    tight = close(2e-6)
    check_kernel("hc_pre", (x, fn, scale * 0.02, base, *scalars), (rounded(dtype), tight, close(1e-5)))


@pytest.mark.parametrize("name", PRE_NAMES)
def test_rows_do_not_depend_on_the_batch(name):
    """Neither on their place in a tile, nor on how many tokens a CTA takes, nor on who adds the partial sums (130 and
    2100 tokens are on both sides of that)."""
    for tokens in (130, 2100):
        arguments = arguments_of(name, (tokens,), dim=640, dtype=BF16, group=128)
        assert_rows_independent(name, arguments, rows_of(name, arguments), (0, 15, 16, tokens - 1))


@pytest.mark.parametrize("n", [2, 4, 16])
def test_rows_of_other_shapes_do_not_depend_on_the_batch(n):
    """Other numbers of streams, and columns that are no whole splits."""
    arguments = arguments_of("hc_pre", (2049,), n=n, dim=72, dtype=BF16)
    assert_rows_independent("hc_pre", arguments, (0,), (0, 1000, 2048))


@pytest.mark.sanitize
@pytest.mark.parametrize(("tokens", "dim"), [(70, 512), (2051, 640)])
def test_many_tokens(tokens, dim):
    """Warps that own tokens, one split a CTA and several; rows of a CTA one after another."""
    check("hc_post_pre_rms_norm_quant_fp8", (tokens,), dim=dim, group=128)
    check("hc_pre_rms_norm_quant_nvfp4", (tokens,), dim=dim)


@pytest.mark.parametrize("tokens", [32, 33, 256, 257])
def test_tokens_at_the_ends_of_a_tactic(tokens):
    check("hc_pre", (tokens,), dim=256)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", ["hc_pre", "hc_post", "hc_head", *QUANTISED])
def test_values_that_are_not_finite_stay_in_their_row(name, dtype):
    arguments = arguments_of(name, (6,), dim=128, dtype=dtype)
    x = arguments[1 if "post" in name else 0]
    x[1, 0, 5], x[2, 3, 127], x[3, 1] = float("nan"), float("inf"), float("-inf")
    x[4] = -0.0
    expected, actual = (
        result if isinstance(result, tuple) else (result,)
        for result in (getattr(ops, name)(*arguments), getattr(ops, name)(*on_cuda(arguments)))
    )
    for output, left, right in zip(TABLE[name].outputs, actual, expected, strict=True):
        left, right = left.cpu(), right
        if left.dtype != torch.uint8:
            assert torch.equal(left.float().isnan(), right.float().isnan()), output
        if output == "streams" or name == "hc_post":
            bits(left, right)
        if left.dtype in (BF16, FP32):
            finite = right.isfinite()
            torch.testing.assert_close(left.float()[finite], right.float()[finite], rtol=2.0**-6, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 4, 7, 16])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.05])
@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_sinkhorn_of_matrices_that_converge_slowly(n, eps, iterations):
    """Almost one-hot and almost triangular matrices: where eps is added and how often it is divided decides elements.
    An element is a product of 40 factors, each a sum of n and a division: (n + 1) * 40 * 2^-24 on either side."""
    noise = random(65, n, n) * 0.1
    for logits in (noise + 12 * torch.eye(n), noise + 9 * torch.ones(n, n).tril(), noise * 40):
        check_kernel("sinkhorn", (logits, eps, iterations), close(2e-5 + (n + 1) * 2e-6))


def test_leading_dimensions_are_free():
    for rows in ((), (2, 3), (2, 0), (1, 2, 2)):
        check("hc_post_pre_rms_norm_quant_fp8", rows, dim=128)


def test_layouts_that_the_kernels_cannot_read_are_named():
    x, *rest = on_cuda(arguments_of("hc_pre", (6,), dim=64, dtype=BF16))
    with pytest.raises(RuntimeError, match="dsv4::hc_pre: x must be rows at one distance"):
        ops.hc_pre(x.unflatten(0, (2, 3))[:, :2], *rest)
    with pytest.raises(RuntimeError, match="dsv4::hc_pre: x must be rows that start at multiples of 16 bytes"):
        ops.hc_pre(torch.zeros(6 * 4 * 64 + 1, dtype=BF16, device="cuda")[1:].view(6, 4, 64), *rest)
    with pytest.raises(RuntimeError, match=r"dsv4::hc_pre: fn must be contiguous"):
        ops.hc_pre(x, rest[0].t().contiguous().t(), *rest[1:])
    f, x, post, comb = on_cuda(arguments_of("hc_post", (6,), dim=64, dtype=BF16))
    with pytest.raises(RuntimeError, match=r"dsv4::hc_post: comb must be contiguous \[6, 4, 4\]"):
        ops.hc_post(f, x, post, comb.transpose(1, 2))


def test_direct_calls_are_checked():
    """`.out` is called without the functional op in front of it: everything is checked again, in words."""
    x, *rest = on_cuda(arguments_of("hc_pre", (6,), dim=64, dtype=BF16))
    out = dict(zip(TABLE["hc_pre"].outputs, TABLE["hc_pre"].alloc(x, *rest), strict=True))
    workspace = TABLE["hc_pre"].workspace(x, *rest)
    call = torch.ops.dsv4.hc_pre.out
    for message, arguments, results in (
        ("workspace must be .* got None", (x, *rest), out),
        (r"workspace must be \[168\] float32 or longer", (x, *rest), out | {"workspace": workspace[:-1]}),
        ("iterations must be at least 1, got 0", (x, *rest[:-1], 0), out | {"workspace": workspace}),
        ("y must be contiguous", (x, *rest), out | {"workspace": workspace, "y": out["y"][:5]}),
        (
            r"base must be \[24\] float32",
            (x, rest[0], rest[1], rest[2][:23], *rest[3:]),
            out | {"workspace": workspace},
        ),
        (r"fn must be \[24, 256\]", (x, rest[0][:, :255], *rest[1:]), out | {"workspace": workspace}),
    ):
        with pytest.raises(RuntimeError, match=f"dsv4::hc_pre: {message}"):
            call(*arguments, **results)
    call(x, *rest, **out, workspace=workspace)
    for left, right in zip(out.values(), ops.hc_pre(x, *rest), strict=True):
        assert_bits_equal(left.cpu(), right.cpu())
