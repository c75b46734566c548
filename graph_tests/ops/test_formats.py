"""Number formats against values derived by hand and against the scalar judges."""

import math

import pytest
import torch

from dsv4_ops.ops import formats
from graph_tests.checks import assert_bits_equal
from graph_tests.ops import scalar

E2M1_ALL = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
E2M1_TIES = {0.25: 0, 0.75: 2, 1.25: 2, 1.75: 4, 2.5: 4, 3.5: 6, 5.0: 6}


def fp32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def byte_tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def test_e2m1_decodes_all_16_codes():
    assert_bits_equal(formats.decode_e2m1(torch.arange(16, dtype=torch.uint8)), fp32(E2M1_ALL))


def test_e2m1_encodes_its_own_values():
    assert_bits_equal(formats.encode_e2m1(fp32(E2M1_ALL)), torch.arange(16, dtype=torch.uint8))


@pytest.mark.parametrize("sign", [0, 8])
def test_e2m1_ties_go_to_the_even_code(sign):
    values = fp32(list(E2M1_TIES)) * (-1 if sign else 1)
    assert_bits_equal(formats.encode_e2m1(values), byte_tensor([code + sign for code in E2M1_TIES.values()]))


def test_e2m1_leaves_a_tie_with_the_next_fp32_number():
    ties = fp32(list(E2M1_TIES))
    below, above = torch.nextafter(ties, fp32(0.0)), torch.nextafter(ties, fp32(9.0))
    assert_bits_equal(formats.encode_e2m1(below), torch.arange(0, 7, dtype=torch.uint8))
    assert_bits_equal(formats.encode_e2m1(above), torch.arange(1, 8, dtype=torch.uint8))


def test_e2m1_saturates_and_keeps_the_sign_of_zero():
    values = fp32([6.001, 7.0, 8.0, 1e38, -1e38, 0.0, -0.0, 1e-45, -1e-45])
    assert_bits_equal(formats.encode_e2m1(values), byte_tensor([7, 7, 7, 7, 15, 0, 8, 0, 8]))


def test_e2m1_encodes_nan_of_either_sign_as_six():
    nan = torch.tensor([0x7FC00000, -0x400000], dtype=torch.int32).view(torch.float32)
    assert_bits_equal(formats.encode_e2m1(nan), byte_tensor([7, 7]))


def test_e2m1_matches_the_judge_on_every_bf16_number():
    bits = torch.arange(1 << 16, dtype=torch.int32)
    values = bits.to(torch.int16).view(torch.bfloat16).float()
    values = values[values.isfinite() & (values.abs() < 16) & (values.abs() > 2**-6)]
    expected = byte_tensor([scalar.e2m1_code(value) for value in values.tolist()])
    assert_bits_equal(formats.encode_e2m1(values), expected)


def test_e2m1_packs_the_even_element_into_the_low_nibble():
    packed = formats.pack_e2m1(formats.encode_e2m1(fp32([1.0, 6.0, -0.5, 3.0])))
    assert_bits_equal(packed, byte_tensor([0x72, 0x59]))
    assert_bits_equal(formats.unpack_e2m1(packed), byte_tensor([2, 7, 9, 5]))


def test_e4m3_decodes_all_256_codes():
    decoded = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(formats.FP8).float()
    for byte, value in enumerate(decoded.tolist()):
        expected = scalar.e4m3_value(byte)
        assert value == expected or (math.isnan(value) and math.isnan(expected)), byte


def test_e4m3_encodes_its_own_values():
    codes = byte_tensor([byte for byte in range(256) if byte & 0x7F != 0x7F])
    assert_bits_equal(formats.cast_e4m3(codes.view(formats.FP8).float()).view(torch.uint8), codes)


def test_e4m3_rounds_to_nearest_with_ties_to_the_even_code():
    table = torch.tensor(scalar.E4M3_TABLE)
    middle = (table[1:] + table[:-1]) / 2  # exact: neighbours differ in the last of four bits
    for values in (middle, torch.nextafter(middle, fp32(0.0)), torch.nextafter(middle, fp32(999.0))):
        for signed in (values, -values):
            expected = byte_tensor([scalar.e4m3_code(value) for value in signed.tolist()])
            assert_bits_equal(formats.cast_e4m3(signed).view(torch.uint8), expected)


def test_e4m3_saturates_at_448_and_keeps_nan():
    values = fp32([448.0, 449.0, 463.9, 464.0, 465.0, 1e38, -464.0, -1e38, math.nan, -0.0])
    expected = byte_tensor([0x7E, 0x7E, 0x7E, 0x7E, 0x7E, 0x7E, 0xFE, 0xFE, 0x7F, 0x80])
    assert_bits_equal(formats.cast_e4m3(values).view(torch.uint8), expected)


def test_pow2_is_exact_for_all_normal_exponents():
    exponents = torch.arange(-126, 128, dtype=torch.int32)
    assert_bits_equal(formats.pow2(exponents), fp32([2.0**e for e in exponents.tolist()]))


def test_ue8m0_decodes_every_scale_byte():
    codes = torch.arange(255, dtype=torch.int32).to(torch.uint8)
    assert_bits_equal(formats.decode_ue8m0(codes), fp32([2.0 ** (byte - 127) for byte in range(255)]))


def test_ue8m0_carries_nan_and_infinity_as_nan():
    broken = torch.tensor([0x7FC00000, -1, 0x7F800000], dtype=torch.int32).view(torch.float32)  # NaN, -NaN, infinity
    assert_bits_equal(formats.ceil_ue8m0(broken), byte_tensor([255, 255, 255]))
    assert formats.decode_ue8m0(byte_tensor([255])).isnan().all()


def test_ue8m0_ceil_steps_just_above_a_power_of_two():
    exponents = list(range(-126, 127))
    exact = fp32([2.0**e for e in exponents])
    bytes_at = byte_tensor([e + 127 for e in exponents])
    assert_bits_equal(formats.ceil_ue8m0(exact), bytes_at)
    assert_bits_equal(formats.ceil_ue8m0(torch.nextafter(exact, fp32(3e38))), bytes_at + 1)
    assert_bits_equal(formats.ceil_ue8m0(torch.nextafter(exact, fp32(0.0))[1:]), bytes_at[1:])


@pytest.mark.parametrize("largest, group_scale", [(448.0, formats.fp8_group_scale), (6.0, formats.mxfp4_group_scale)])
def test_group_scale_keeps_the_smaller_scale_when_amax_is_a_multiple_of_the_largest_code(largest, group_scale):
    exponents = range(-20, 100)
    amax = fp32([largest * 2.0**e for e in exponents])
    assert_bits_equal(group_scale(amax), byte_tensor([e + 127 for e in exponents]))


@pytest.mark.parametrize(
    "group_scale, judge, largest",
    [
        (formats.fp8_group_scale, scalar.fp8_scale_byte, 448.0),
        (formats.mxfp4_group_scale, scalar.mxfp4_scale_byte, 6.0),
    ],
)
def test_group_scale_matches_the_judge_around_every_boundary(group_scale, judge, largest):
    boundaries = [largest * 2.0**e for e in (-133, -130, -126, -30, -22, -21, -3, 0, 1, 60, 118)]
    amax = [scalar.next_up(bound, step) for bound in boundaries for step in (-2, -1, 0, 1, 2, 3)]
    amax += [0.0, 1e-45, 1e-38, 1e-5, scalar.f32(1e-4), scalar.next_up(1e-4), 1e38]
    assert_bits_equal(group_scale(fp32(amax)), byte_tensor([judge(scalar.f32(value)) for value in amax]))


def test_group_scale_of_an_empty_group_is_the_floor():
    zero = torch.zeros(1)
    assert formats.fp8_group_scale(zero).item() == 127 - 22  # 1e-4 / 448 = 2.2e-7 is in (2^-23, 2^-22]
    assert formats.mxfp4_group_scale(zero).item() == 1


def sylvester(size: int) -> torch.Tensor:
    """H_1 = [1], H_2n = [[H_n, H_n], [H_n, -H_n]]."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix


@pytest.mark.parametrize("size", [1, 2, 4, 32, 64, 128])
def test_hadamard_is_the_sylvester_matrix_over_the_root_of_its_size(size):
    x = torch.randint(-1000, 1000, (3, 2, size), generator=torch.Generator().manual_seed(0)).float()
    expected = (x @ sylvester(size)) * size**-0.5  # integers below 2^24: the sums are exact in fp32
    assert_bits_equal(formats.hadamard(x), expected)


def test_hadamard_undoes_itself():
    """H H = I; log2(128) = 7 additions each way, so at most 14 roundings of 2^-24 plus the scaling twice."""
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    error = (formats.hadamard(formats.hadamard(x)) - x).norm() / x.norm()
    assert error < 16 * 2**-24
