"""Attention with quantised output on the GPU: bit for bit attention and quant_fp8 there, whichever kernel runs.

The kernels differ in who has the 128 dimensions that share a scale: eight lanes of a warp, two CTAs of a cluster that
have a slab each (few rows), a quad of lanes (tiles of 64 heads), or two warps (without tensor cores).
"""

import pytest
import torch

from dsv4_ops.ops.attention_quant import GROUP
from dsv4_ops.registry import TABLE
from graph_tests.checks import assert_bits_equal
from graph_tests.cuda.kernel_checks import assert_rows_independent, bits, check_kernel, on_cuda
from graph_tests.cuda.test_attention import KINDS, TENSOR, full, rows_from
from graph_tests.cuda.test_attention_wide import many
from graph_tests.ops.attention_cases import FULL, make, sequence_arguments

pytestmark = pytest.mark.cuda

OPS = torch.ops.dsv4
BF16, F32 = torch.bfloat16, torch.float32
Results = tuple[torch.Tensor, ...]


def name_of(kind: str) -> str:
    return f"sparse_attention_{kind}_quant_fp8"


def run(kind: str, arguments: tuple, workspace: bool = True) -> Results:
    """Of the quantised op on the GPU; without workspace, one CTA has all of a row."""
    op = TABLE[name_of(kind)]
    if workspace:
        return op.overload(*arguments)
    results = op.alloc(*arguments)
    op.packet.out(*arguments, **dict(zip(op.outputs, results, strict=True)))
    return results


def expected(kind: str, arguments: tuple) -> Results:
    """Of attention and quant_fp8 one after the other."""
    o, lse = getattr(OPS, f"sparse_attention_{kind}")(*arguments)
    codes, scale = OPS.quant_fp8(o.flatten(-2), GROUP)
    return codes.view(o.shape), scale.view(*o.shape[:-1], o.shape[-1] // GROUP), lse


def check(kind: str, arguments: tuple) -> None:
    arguments = on_cuda(arguments)
    wanted = expected(kind, arguments)
    for workspace in (True, False):
        for actual, judge in zip(run(kind, arguments, workspace), wanted, strict=True):
            bits(actual.cpu(), judge.cpu())


@pytest.mark.sanitize
@pytest.mark.parametrize("heads", [8, 16, 24, 40])
def test_few_rows_and_tiles_of_all_sizes(heads):
    """With a workspace two kernels share out a row, and slabs are paired in clusters; without, a CTA has it all."""
    arguments = full("selected", [[60], [-1]], heads=heads, k=70)
    assert TABLE[name_of("selected")].workspace(*on_cuda(arguments)).numel() > 0
    check("selected", arguments)


def of_heads(kind: str, arguments: tuple, heads: int) -> tuple:
    """The same call of fewer heads."""
    sink = 2 if kind == "window" else 3
    return (
        arguments[0][:, :, :heads].contiguous(),
        *arguments[1:sink],
        arguments[sink][:heads],
        *arguments[sink + 1 :],
    )


@pytest.mark.parametrize("rows", [1, 16, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_decode_step(kind, rows):
    arguments = full(kind, many(rows + 8)[8:], heads=128)
    for heads in (8, 16, 24, 64, 128):
        check(kind, of_heads(kind, arguments, heads))


@pytest.mark.parametrize("heads", [8, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_chunk_of_a_prefill(kind, heads):
    check(kind, full(kind, [rows_from(0, 300)], heads=heads))


@pytest.mark.sanitize
@pytest.mark.parametrize("rows", [8, 12])
def test_tiles_of_64_heads(rows):
    """Sequences of up to 8 rows have one way of adding up units, longer ones another."""
    check("window", full("window", [[60 + row for row in range(rows)]] * 9, heads=72))


def test_more_keys_than_stages():
    check("compressed", full("compressed", [[2000], [70]], ratio=1, heads=64))


@pytest.mark.parametrize("rows", [4, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_keys(kind, rows):
    """Codes of zero, with the scale that quant_fp8 gives a group of zeros."""
    arguments = on_cuda(full(kind, [[-1]] * rows, heads=64))
    codes, scale, lse = run(kind, arguments)
    assert (codes.float() == 0).all() and (lse == -torch.inf).all()
    _, expected_scale = OPS.quant_fp8(torch.zeros(1, GROUP, device="cuda"), GROUP)
    assert (scale == expected_scale.item()).all()


@pytest.mark.parametrize("rows", [3, 150])
@pytest.mark.parametrize("kind", KINDS)
def test_queries_that_are_not_finite(kind, rows):
    arguments = full(kind, [[200 + row % 5] for row in range(rows)], heads=64)
    arguments[0][0, 0, 3, 5], arguments[0][1, 0, 60, 500] = torch.nan, torch.inf
    check(kind, arguments)


@pytest.mark.parametrize("rows", [3, 150])
def test_output_that_is_not_finite(rows):
    """A row's only key has rope dimensions near the largest number; turned back, some overflow. Their group's scale is
    NaN; the other groups of the head have scales and codes as ever."""
    sink = torch.full((64,), -torch.inf)
    q, pool, *rest = full("window", [[200 + row] for row in range(rows)], heads=64, window=1, sink=sink)
    q[..., -FULL[1] :] = 0
    pool[:, : 64 * 576].view(-1, 64, 576)[..., 448:] = 0x7F  # bf16 0x7F7F, 3.4e38
    check("window", (q, pool, *rest))
    _, scale, _ = run("window", on_cuda((q, pool, *rest)))
    assert (scale[..., -1] == 255).all() and (scale[..., :-1] < 255).all()


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(kind, heads):
    arguments = full(kind, [[40 + b * 5, 41 + b * 5] for b in range(80)], heads=heads)
    assert_rows_independent(name_of(kind), arguments, sequence_arguments(kind), rows=(0, 1, 33, 79))


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_contract_of_a_kernel(kind, rows):
    """Every byte of the outputs is written and nothing else, runs and replays of a graph give the same bits."""
    arguments = full(kind, many(rows), heads=64)

    def same_shape(codes: torch.Tensor, judge: torch.Tensor) -> None:
        assert codes.shape == judge.shape and codes.dtype == judge.dtype

    def one_apart(scale: torch.Tensor, judge: torch.Tensor) -> None:
        """Weights are rounded to bf16, which may move the largest value beyond a power of two."""
        assert ((scale.int() - judge.int()).abs() <= 1).all()

    check_kernel(name_of(kind), arguments, (same_shape, one_apart, TENSOR[1]))


@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_strided_queries_and_empty_batches(kind, batch):
    arguments = full(kind, [[300, 301], [4, 5], [77, 78]])
    places = sequence_arguments(kind)
    q, *rest = (a[:batch] if i in places else a for i, a in enumerate(arguments))
    wide = torch.zeros(*q.shape[:-1], FULL[0] + 8, dtype=BF16)  # rows start at multiples of 16 bytes
    wide[..., : FULL[0]] = q
    check(kind, (wide[..., : FULL[0]], *rest))


@pytest.mark.sanitize
@pytest.mark.parametrize("dims", [(128, 64), (384, 64), FULL])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_plain_kernel(dtype, dims):
    positions = [[0, 1], [126, 127], [200, -1], [-1, -1]]
    packed = dims != FULL
    options = {"window": 32, "pages": (61, 2), "k": 30, "heads": 5, "packed": packed, "dtype": dtype}
    check("selected", make("selected", positions, dims=dims, **options)[0])


def test_grouped_product_takes_the_codes():
    arguments = on_cuda(full("selected", [[300], [301]], heads=16))
    codes, scale, _ = run("selected", arguments)
    x, x_scale = (part.flatten(-2).unflatten(-1, (4, -1)) for part in (codes, scale))
    weight = torch.randn(4 * 128, x.shape[-1], device="cuda").to(torch.float8_e4m3fn)
    weight_scale = torch.full((4, x.shape[-1] // 128), 120, dtype=torch.uint8, device="cuda")
    o, _ = OPS.sparse_attention_selected(*arguments)
    quantised = OPS.quant_fp8(o.flatten(-2).unflatten(-1, (4, -1)), GROUP)
    one = OPS.grouped_linear_fp8(x, x_scale, weight, weight_scale)
    assert_bits_equal(one.cpu(), OPS.grouped_linear_fp8(*quantised, weight, weight_scale).cpu())


def test_wrong_outputs_are_named():
    arguments = on_cuda(full("window", [[20, 21]]))
    out, op = OPS.sparse_attention_window_quant_fp8.out, TABLE[name_of("window")]
    codes, scale, lse = op.alloc(*arguments)
    with pytest.raises(RuntimeError, match="dsv4::sparse_attention_window_quant_fp8: o_codes must be"):
        out(*arguments, o_codes=codes.view(torch.uint8), o_scale=scale, lse=lse)
    with pytest.raises(RuntimeError, match="o_scale must be"):
        out(*arguments, o_codes=codes, o_scale=scale[..., :2], lse=lse)
    with pytest.raises(RuntimeError, match="lse must be"):
        out(*arguments, o_codes=codes, o_scale=scale, lse=lse.half())
    narrow = on_cuda(make("window", [[20, 21]], dims=(192, 64), dtype=BF16)[0])
    codes, scale = torch.empty_like(narrow[0], dtype=codes.dtype), torch.empty(1, 2, 8, 1, dtype=torch.uint8).cuda()
    with pytest.raises(RuntimeError, match="q must be .* with D a multiple of 128"):
        out(*narrow, o_codes=codes, o_scale=scale, lse=lse[..., :8].contiguous())
