"""NVFP4 against the scalar judge, the 128x4 scale layout against an index loop, and the op contracts."""

import pytest
import torch

from dsv4_ops import ops
from dsv4_ops.registry import TABLE
from graph_tests import checks
from graph_tests.checks import assert_bits_equal
from graph_tests.ops import scalar

K = 80  # five blocks of 16: the last tile of four scales is padded
DTYPES = [torch.bfloat16, torch.float32]
GLOBALS = [ops.nvfp4_global_scale, ops.nvfp4_row_scale]
LAYOUTS = [lambda x: x, checks.row_strided]


def batch(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size, K, generator=torch.Generator().manual_seed(size)).to(dtype)


def adversarial(dtype: torch.dtype) -> torch.Tensor:
    """[10, 80]: zero, subnormal, near-zero and huge blocks, one outlier, amax exactly at code * scale, ties."""
    x = batch(10)
    x[0] = 0
    x[1] *= 1e-40
    x[2] *= 1e-20
    x[3] *= 1e34
    x[4, :16] *= 1e-6  # near-zero block in a normal row
    x[4, 16:32] = -0.0
    x[5, 7] = 1e5  # the other blocks are almost nothing
    x[6] = torch.arange(K) % 25 / 4.0 - 3
    x[7] = 6.0
    x[8] = torch.logspace(-12, 12, K)
    x[9] = batch(1)[0] * torch.logspace(0, -9, K)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_global_scale_is_amax_over_2688(dtype):
    for x in (adversarial(dtype), adversarial(dtype)[:1], adversarial(dtype)[1:2], batch(0, dtype)):
        expected = scalar.nvfp4_global_scale(x.float().flatten().tolist())
        assert_bits_equal(ops.nvfp4_global_scale(x), torch.tensor([expected]))


def test_global_scale_of_zeros_is_the_smallest_normal_number():
    assert ops.nvfp4_global_scale(torch.zeros(2, 16)).tolist() == [2.0**-126]
    assert ops.nvfp4_global_scale(torch.zeros(0, 16)).tolist() == [2.0**-126]


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_scale_is_the_global_scale_of_each_row(dtype):
    x = adversarial(dtype)
    expected = [[scalar.nvfp4_global_scale(row)] for row in x.float().tolist()]
    assert_bits_equal(ops.nvfp4_row_scale(x), torch.tensor(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_of", GLOBALS, ids=["tensor", "row"])
def test_quant_nvfp4_is_the_judge_on_adversarial_rows(scale_of, dtype):
    x = adversarial(dtype)
    global_scale = scale_of(x)
    rows = [
        scalar.quant_nvfp4(row, float(scale))
        for row, scale in zip(x.float().tolist(), global_scale.flatten().expand(10).tolist(), strict=True)
    ]
    q, scale = ops.quant_nvfp4(x, global_scale)
    assert_bits_equal(q, torch.tensor([codes for codes, _ in rows], dtype=torch.uint8))
    assert_bits_equal(scale.view(torch.uint8), torch.tensor([scales for _, scales in rows], dtype=torch.uint8))


def test_quant_nvfp4_saturates_when_the_global_scale_is_too_small():
    """A calibrated global scale may be below the one of this tensor."""
    x = batch(2)
    x[0, 3], x[1, 20] = 1e6, -3e38
    q, scale = ops.quant_nvfp4(x, torch.tensor([1e-3]))
    for row in range(2):
        codes, scales = scalar.quant_nvfp4(x[row].tolist(), scalar.f32(1e-3))
        assert q[row].tolist() == codes and scale[row].view(torch.uint8).tolist() == scales
    assert scale[0, 0].float() == 448 and q[0, 1] >> 4 == 7


def test_block_scale_is_one_division_by_six_times_the_global_scale():
    """Block amax within two fp32 steps of a tie of the E4M3 scale: dividing by 6 and then by the scale rounds twice."""
    for global_scale in torch.rand(20, generator=torch.Generator().manual_seed(5)).tolist():
        tie = scalar.f32(scalar.f32(6 * global_scale) * 1.0625)  # between the scales 1.0 and 1.125
        x = torch.tensor([scalar.next_up(tie, step) for step in (-2, -1, 0, 1, 2)])[:, None].expand(5, 16)
        _, scale = ops.quant_nvfp4(x, torch.tensor([global_scale]))
        expected = [scalar.quant_nvfp4(row, global_scale)[1] for row in x.tolist()]
        assert_bits_equal(scale.view(torch.uint8), torch.tensor(expected, dtype=torch.uint8))


def test_codes_are_found_with_the_rounded_block_scale():
    """amax / 6 = 1.05 rounds to the block scale 1.0; 5.2 / 1.05 would be nearer to 4, 5.2 / 1.0 is nearer to 6."""
    x = torch.zeros(1, 16)
    x[0, 0], x[0, 1] = 6.3, 5.2
    q, scale = ops.quant_nvfp4(x, torch.ones(1))
    assert scale.float().tolist() == [[1.0]] and q[0, 0] == 0x77


def test_even_element_is_in_the_low_nibble():
    x = torch.zeros(1, 16)
    x[0, :4] = torch.tensor([1.0, 6.0, -0.5, 3.0])
    q, _ = ops.quant_nvfp4(x, torch.ones(1))
    assert q[0].tolist() == [0x72, 0x59, 0, 0, 0, 0, 0, 0]


def test_a_block_whose_scale_rounds_to_zero_has_zero_codes():
    """The scale 2^-10 is a tie between 0 and the smallest E4M3 number 2^-9; the next fp32 number is not."""
    x = torch.zeros(2, 16)
    x[0, 0], x[1, 0] = -6 * 2.0**-10, scalar.next_up(6 * 2.0**-10)
    q, scale = ops.quant_nvfp4(x, torch.ones(1))
    assert scale.float().tolist() == [[0.0], [2.0**-9]]
    assert q[0].tolist() == [0] * 8 and q[1, 0] == 5  # 3 steps


def test_dequant_nvfp4_rounds_once():
    q = torch.arange(16, dtype=torch.uint8).view(2, 8) * 16 + torch.arange(15, -1, -1, dtype=torch.uint8).view(2, 8)
    scale = torch.tensor([[0x3D], [0x07]], dtype=torch.uint8)  # 1.625 and a subnormal
    for global_scale in (torch.tensor([0.1]), torch.tensor([[0.1], [3e-5]])):
        expected = [
            [
                scalar.f32(scalar.e2m1_value(code) * scalar.e4m3_value(scale[row, 0].item()) * factor)
                for byte in q[row].tolist()
                for code in (byte % 16, byte // 16)
            ]
            for row, factor in enumerate(global_scale.flatten().expand(2).tolist())
        ]
        actual = ops.dequant_nvfp4(q, scale.view(torch.float8_e4m3fn), global_scale)
        assert_bits_equal(actual, torch.tensor(expected))


@pytest.mark.parametrize("scale_of", GLOBALS, ids=["tensor", "row"])
def test_cosine_of_a_gaussian_tensor_with_its_quantised_self(scale_of):
    """0.9955 is the published figure for one operand; over 2^18 samples the estimate moves by less than 1e-4."""
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    global_scale = scale_of(x)
    y = ops.dequant_nvfp4(*ops.quant_nvfp4(x, global_scale), global_scale)
    assert abs(torch.cosine_similarity(x.flatten(), y.flatten(), dim=0) - 0.9955) < 2e-4


def test_row_scale_makes_a_row_independent_of_its_batch():
    x = batch(7)
    x[3] *= 1e4
    q, scale = ops.quant_nvfp4(x, ops.nvfp4_row_scale(x))
    alone_q, alone_scale = ops.quant_nvfp4(x[:1], ops.nvfp4_row_scale(x[:1]))
    assert_bits_equal(q[:1], alone_q)
    assert_bits_equal(scale[:1], alone_scale)


def test_nan_reaches_the_dequantised_row():
    x = batch(2)
    x[1, 40] = torch.nan
    global_scale = ops.nvfp4_row_scale(x)
    y = ops.dequant_nvfp4(*ops.quant_nvfp4(x, global_scale), global_scale)
    assert not y[0].isnan().any() and y[1].isnan().all()


def loop_128x4(scale: torch.Tensor) -> torch.Tensor:
    """Byte of scale (r, c): tile (r // 128, c // 4) of 512 bytes, in it (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4."""
    rows, columns = scale.shape
    column_tiles = (columns + 3) // 4
    flat = bytearray((rows + 127) // 128 * column_tiles * 512)
    for r, values in enumerate(scale.view(torch.uint8).tolist()):
        for c, value in enumerate(values):
            flat[(r // 128 * column_tiles + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = value
    return torch.tensor(list(flat), dtype=torch.uint8)


def random_scales(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(1, 127, (rows, columns), generator=generator).to(torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("rows, columns", [(0, 4), (1, 1), (31, 3), (33, 4), (128, 8), (130, 5), (257, 9)])
def test_128x4_layout_is_the_index_loop(rows, columns):
    scale = random_scales(rows, columns)
    flat = ops.nvfp4_scale_to_128x4(scale)
    assert_bits_equal(flat.view(torch.uint8), loop_128x4(scale))
    assert_bits_equal(ops.nvfp4_scale_from_128x4(flat, rows, columns), scale)


@pytest.mark.parametrize("size", [0, 1, 130])
def test_quant_nvfp4_128x4_differs_only_in_the_place_of_scales(size):
    x = batch(size)
    global_scale = ops.nvfp4_global_scale(x)
    q, scale = ops.quant_nvfp4(x, global_scale)
    tiled_q, tiled_scale = ops.quant_nvfp4_128x4(x, global_scale)
    assert_bits_equal(tiled_q, q)
    assert_bits_equal(tiled_scale.view(torch.uint8), loop_128x4(scale))
    expected = ops.dequant_nvfp4(q, scale, global_scale)
    assert_bits_equal(ops.dequant_nvfp4_128x4(tiled_q, tiled_scale, global_scale), expected)


def test_leading_dimensions_are_rows():
    x = batch(6)
    nested = x.view(2, 3, K)
    global_scale = ops.nvfp4_row_scale(nested)
    assert_bits_equal(global_scale.view(6, 1), ops.nvfp4_row_scale(x))
    expected = ops.quant_nvfp4(x, ops.nvfp4_row_scale(x))
    for many, flat in zip(ops.quant_nvfp4(nested, global_scale), expected, strict=True):
        assert_bits_equal(many.flatten(0, 1), flat)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "row_strided"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 2, 7, 64])
def test_op_contract(size, dtype, layout):
    x = layout(batch(size, dtype))
    checks.check_op("nvfp4_global_scale", (x,))
    checks.check_op("nvfp4_row_scale", (x,))
    for scale_of in GLOBALS:
        global_scale = scale_of(x)
        checks.check_op("quant_nvfp4", (x, global_scale))
        checks.check_op("quant_nvfp4_128x4", (x, global_scale))
        q, scale = (layout(part) for part in ops.quant_nvfp4(x, global_scale))
        checks.check_op("dequant_nvfp4", (q, scale, global_scale))
        q, scale = ops.quant_nvfp4_128x4(x, global_scale)
        checks.check_op("dequant_nvfp4_128x4", (layout(q), scale, global_scale))
    checks.check_op("nvfp4_scale_to_128x4", (layout(random_scales(size, 5)),))
    checks.check_op("nvfp4_scale_from_128x4", (ops.nvfp4_scale_to_128x4(random_scales(size, 5)), size, 5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_give_the_same_bits(dtype):
    x = batch(7, dtype)
    for strided in (checks.row_strided(x), x.t().contiguous().t()):
        assert_bits_equal(ops.nvfp4_global_scale(strided), ops.nvfp4_global_scale(x))
        global_scale = ops.nvfp4_row_scale(strided)
        assert_bits_equal(global_scale, ops.nvfp4_row_scale(x))
        for op in (ops.quant_nvfp4, ops.quant_nvfp4_128x4):
            for actual, expected in zip(op(strided, global_scale), op(x, global_scale), strict=True):
                assert actual.is_contiguous()
                assert_bits_equal(actual, expected)
        q, scale = (part.t().contiguous().t() for part in ops.quant_nvfp4(x, global_scale))
        actual = ops.dequant_nvfp4(q, scale, global_scale)
        assert actual.is_contiguous()
        assert_bits_equal(actual, ops.dequant_nvfp4(*ops.quant_nvfp4(x, global_scale), global_scale))


def test_no_guard_on_the_batch():
    def quantised(size):
        x = batch(size, torch.bfloat16)
        global_scale = ops.nvfp4_row_scale(x)
        return *ops.quant_nvfp4(x, global_scale), global_scale

    checks.check_symbolic_batch("nvfp4_global_scale", lambda size: (batch(size),))
    checks.check_symbolic_batch("nvfp4_row_scale", lambda size: (batch(size),))
    for name in ("quant_nvfp4", "quant_nvfp4_128x4"):
        checks.check_symbolic_batch(name, lambda size: (batch(size), torch.ones(1)))
        checks.check_symbolic_batch(name, lambda size: (batch(size), torch.ones(size, 1)))
    checks.check_symbolic_batch("dequant_nvfp4", quantised)
    checks.check_symbolic_batch("nvfp4_scale_to_128x4", lambda size: (random_scales(size, 9),))


def test_the_128x4_reference_traces_once_for_all_batches():
    """Padding to whole tiles and viewing them would guard on the number of tiles."""
    torch._dynamo.reset()
    compiled = torch.compile(TABLE["quant_nvfp4_128x4"].reference, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (5, 128, 129, 300):
            x = batch(size)
            torch._dynamo.mark_dynamic(x, 0)
            global_scale = torch.ones(1)
            q, scale = compiled(x, global_scale)
            assert_bits_equal(scale.view(torch.uint8), loop_128x4(ops.quant_nvfp4(x, global_scale)[1]))


def test_opcheck():
    x = batch(3, torch.bfloat16)
    global_scale = ops.nvfp4_row_scale(x)
    checks.opcheck("nvfp4_global_scale", (x,))
    checks.opcheck("nvfp4_row_scale", (x,))
    for form in ("nvfp4", "nvfp4_128x4"):
        checks.opcheck(f"quant_{form}", (x, global_scale))
        checks.opcheck(f"dequant_{form}", (*getattr(ops, f"quant_{form}")(x, global_scale), global_scale))
    flat = ops.nvfp4_scale_to_128x4(random_scales(5, 3))
    checks.opcheck("nvfp4_scale_to_128x4", (random_scales(5, 3),))
    checks.opcheck("nvfp4_scale_from_128x4", (flat, 5, 3))


E4M3 = torch.float8_e4m3fn
CODES = torch.zeros(2, 32, dtype=torch.uint8)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("quant_nvfp4", (torch.zeros(2, 24), torch.ones(1)), r"multiple of 16, got \[2, 24\]"),
        ("quant_nvfp4", (torch.zeros(2, 32), torch.ones(2, 2)), r"global_scale must be \[1\] or \[T, 1\]"),
        ("quant_nvfp4_128x4", (torch.zeros(2, 2, 32), torch.ones(1)), "flatten the leading dimensions"),
        ("dequant_nvfp4", (CODES, torch.zeros(2, 2, dtype=E4M3), torch.ones(1)), "K/16"),
        ("dequant_nvfp4_128x4", (CODES, torch.zeros(2, 4, dtype=E4M3), torch.ones(1)), "flat"),
        ("nvfp4_scale_to_128x4", (torch.zeros(2, 4),), "float8_e4m3fn"),
        ("nvfp4_scale_from_128x4", (torch.zeros(512, dtype=torch.uint8), 2, 4), "float8_e4m3fn"),
    ],
)
def test_refuses_by_name_what_does_not_fit(name, arguments, message):
    with pytest.raises(ValueError, match=f"dsv4::{name}: .*{message}"):
        getattr(ops, name)(*arguments)
