"""Weights in their storage formats. Judges: transformers' dequantisation, and brute force over all codes."""

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from model.dequantize import dequantize_weight
from model.quantize import (
    cast_mxfp4_to_nvfp4,
    nvfp4_weight_scale_2,
    quantize_weight_fp8,
    quantize_weight_mxfp4,
    quantize_weight_nvfp4,
)

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E4M3 = E4M3[E4M3.isfinite()]


def transformers_value(weight, scale):
    return Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)


def random_weight(rows, columns, seed=0):
    """Normal numbers whose blocks differ in size by up to 2^6, with an all-zero corner."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= 2.0 ** torch.randint(-3, 4, (rows, 1), generator=generator)
    weight[:2, :64] = 0
    return weight


def random_bytes(*shape, low=0, high=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(torch.uint8)


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


def codes_of(packed):
    """Nibbles, low one first, by arithmetic instead of a table."""
    return torch.stack((packed % 16, packed // 16), -1).flatten(-2).long()


def assert_nearest(value, grid_value, grid, scale):
    """No number of the grid times scale is nearer to value; 1e-6 for the fp32 division by the scale."""
    best = (value.double()[..., None] - grid.double() * scale.double()[..., None]).abs().amin(-1)
    error = (value.double() - grid_value.double()).abs()
    assert (error <= best + 1e-6 * value.double().abs()).all()


# ---- dequantize -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale_dtype", ["e8m0", "fp32"])
def test_dequantized_fp8_is_what_transformers_computes(scale_dtype):
    weight = random_weight(256, 384).to(torch.float8_e4m3fn)
    if scale_dtype == "e8m0":
        scale = random_bytes(2, 3, low=100, high=140)
        judge = transformers_value(weight, scale.view(torch.float8_e8m0fnu))
    else:
        scale = torch.rand(2, 3) + 0.1
        judge = transformers_value(weight, scale)
    assert torch.equal(bits(dequantize_weight("fp8", weight, scale)), bits(judge))


def test_dequantized_fp8_has_short_last_blocks():
    weight, scale = torch.ones(130, 200).to(torch.float8_e4m3fn), torch.tensor([[127, 128], [129, 130]])
    value = dequantize_weight("fp8", weight, scale.to(torch.uint8))
    assert (value[:128, :128] == 1).all() and (value[:128, 128:] == 2).all()
    assert (value[128:, :128] == 4).all() and (value[128:, 128:] == 8).all()


def test_dequantized_mxfp4_is_what_transformers_computes():
    """Every byte of two codes under every scale from 2^-127 to 2^127."""
    weight = random_bytes(1, 256).copy_(torch.arange(256)).repeat(255, 1)
    scale = torch.arange(255, dtype=torch.uint8)[:, None].repeat(1, 16)
    judge = transformers_value(weight.view(torch.int8), scale.view(torch.float8_e8m0fnu))
    assert torch.equal(bits(dequantize_weight("mxfp4", weight, scale)), bits(judge))


def test_dequantized_nvfp4_is_code_times_scale_times_scale_2():
    """Code times block scale is exact, so the only rounding is that of the float64 product to fp32."""
    weight, block = random_bytes(64, 128), random_weight(64, 16).to(torch.float8_e4m3fn)
    scale_2 = torch.tensor(0.0123)
    judge = E2M1[codes_of(weight)].double() * block.double().repeat_interleave(16, -1) * scale_2.double()
    assert torch.equal(bits(dequantize_weight("nvfp4", weight, block, scale_2)), bits(judge.float()))
    assert torch.equal(bits(dequantize_weight("nvfp4", weight, block, scale_2[None])), bits(judge.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_dense_is_the_weight(dtype):
    weight = random_weight(4, 64).to(dtype)
    assert torch.equal(dequantize_weight("dense", weight), weight.float())


# ---- quantize -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(256, 256), (130, 200), (64, 32)])
def test_fp8_codes_are_the_nearest_under_the_smallest_scale(shape):
    weight = random_weight(*shape)
    codes, scale = quantize_weight_fp8(weight)
    factors = scale.view(torch.float8_e8m0fnu).float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    factors = factors[: shape[0], : shape[1]]
    assert_nearest(weight, codes.float() * factors, E4M3, factors)
    for row in range(0, shape[0], 128):
        for column in range(0, shape[1], 128):
            block = weight[row : row + 128, column : column + 128] / factors[row, column]
            assert 224 < block.abs().max() <= 448


def test_mxfp4_codes_are_the_nearest_under_the_smallest_scale():
    weight = random_weight(48, 128)
    packed, scale = quantize_weight_mxfp4(weight)
    factors = scale.view(torch.float8_e8m0fnu).float().repeat_interleave(32, -1)
    assert_nearest(weight, E2M1[codes_of(packed)] * factors, E2M1, factors)
    largest = (weight / factors).abs().unflatten(-1, (-1, 32)).amax(-1)
    assert ((largest > 3) & (largest <= 6) | (largest == 0)).all()


def test_nvfp4_scales_and_codes_are_the_nearest():
    weight = random_weight(48, 128)
    scale_2 = nvfp4_weight_scale_2(weight)
    assert scale_2 == weight.abs().max() / (6 * 448)
    packed, scale = quantize_weight_nvfp4(weight, scale_2)
    wanted = weight.unflatten(-1, (-1, 16)).abs().amax(-1) / (6 * scale_2)
    assert_nearest(wanted, scale.float(), E4M3, torch.ones_like(wanted))
    factors = (scale.float() * scale_2).repeat_interleave(16, -1)
    used = factors != 0
    assert_nearest(weight[used], (E2M1[codes_of(packed)] * factors)[used], E2M1, factors[used])


def test_all_zero_weights_stay_zero():
    weight = torch.zeros(32, 64)
    assert not dequantize_weight("fp8", *quantize_weight_fp8(weight)).any()
    assert not dequantize_weight("mxfp4", *quantize_weight_mxfp4(weight)).any()
    scale_2 = nvfp4_weight_scale_2(weight)
    assert not dequantize_weight("nvfp4", *quantize_weight_nvfp4(weight, scale_2), scale_2).any()


def test_block_that_is_too_small_for_its_scale_becomes_zero():
    weight = torch.ones(1, 32)
    weight[:, 16:] = 1e-7
    scale_2 = nvfp4_weight_scale_2(weight)
    packed, scale = quantize_weight_nvfp4(weight, scale_2)
    assert scale[0, 1] == 0 and not packed[0, 8:].any()


@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_quantising_dequantised_weights_changes_no_value(name):
    if name == "fp8":
        stored = random_weight(256, 256, seed=1).to(torch.float8_e4m3fn), random_bytes(2, 2, low=100, high=140)
        again = quantize_weight_fp8(dequantize_weight(name, *stored))
    else:
        stored = random_bytes(64, 64, seed=2), random_bytes(64, 4, low=100, high=140)
        again = quantize_weight_mxfp4(dequantize_weight(name, *stored))
    assert torch.equal(bits(dequantize_weight(name, *again)), bits(dequantize_weight(name, *stored)))


# ---- MXFP4 -> NVFP4 -------------------------------------------------------------------------------------------------
def assert_same_values(parts, scales, scale_2):
    for (weight, scale), block in zip(parts, scales, strict=True):
        judge = transformers_value(weight.view(torch.int8), scale.view(torch.float8_e8m0fnu))
        assert torch.equal(bits(dequantize_weight("nvfp4", weight, block, scale_2)), bits(judge))


@pytest.mark.parametrize("lowest", [1, 110, 254 - 17])
def test_cast_is_exact_for_every_code_over_eighteen_exponents(lowest):
    """2^-9 to 2^8 are the powers of two of E4M3; also at both ends of what UE8M0 holds."""
    scale = torch.arange(lowest, lowest + 18).to(torch.uint8)[:, None].repeat(1, 16)
    weight = torch.arange(256).to(torch.uint8)[None].repeat(18, 1)
    scales, scale_2 = cast_mxfp4_to_nvfp4([(weight, scale)])
    assert scale_2 == 2.0 ** (lowest + 17 - 127 - 8)
    assert_same_values([(weight, scale)], scales, scale_2)


def test_cast_of_two_weights_shares_the_scale_of_the_larger():
    first = random_bytes(8, 64), random_bytes(8, 4, low=110, high=118)
    second = random_bytes(8, 64, seed=1), random_bytes(8, 4, low=115, high=124, seed=1)
    second[1][0, 0] = 123
    scales, scale_2 = cast_mxfp4_to_nvfp4([first, second])
    assert scale_2 == 2.0 ** (123 - 127 - 8)
    assert_same_values([first, second], scales, scale_2)


def test_cast_refuses_nineteen_exponents():
    scale = torch.tensor([[100, 118]], dtype=torch.uint8)
    assert cast_mxfp4_to_nvfp4([(torch.full((1, 32), 0x11, dtype=torch.uint8), scale)]) is None


def test_cast_does_not_mind_the_exponent_of_a_zero_block():
    """Blocks of zeros carry the smallest exponent in released files; 0x88 is a pair of negative zeros."""
    weight = torch.full((1, 48), 0x11, dtype=torch.uint8)
    weight[:, 16:32], weight[:, 32:] = 0, 0x88
    part = weight, torch.tensor([[118, 1, 254]], dtype=torch.uint8)
    scales, scale_2 = cast_mxfp4_to_nvfp4([part])
    assert scale_2 == 2.0 ** (118 - 127 - 8)
    assert_same_values([part], scales, scale_2)


def test_cast_of_an_all_zero_weight_is_zero():
    scales, scale_2 = cast_mxfp4_to_nvfp4([(torch.zeros(2, 32, dtype=torch.uint8), random_bytes(2, 2, high=255))])
    assert scales[0].float().isfinite().all() and scale_2.isfinite()


def test_cast_refuses_the_nan_scale():
    scale = torch.tensor([[255, 250]], dtype=torch.uint8)
    assert cast_mxfp4_to_nvfp4([(torch.full((1, 32), 0x11, dtype=torch.uint8), scale)]) is None
