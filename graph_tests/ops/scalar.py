"""Independent judges: number formats and quantisers one scalar at a time, exactly (fractions) or in IEEE fp32 steps.

Written from the definitions of the formats, sharing no code with `dsv4_ops`. A step that the specification takes in
fp32 is one Python double operation followed by `f32`: a product of two fp32 numbers is exact in double, and a double
quotient rounded to fp32 is the correctly rounded one.
"""

import bisect
import math
import struct
from fractions import Fraction

import torch


def f32(value: float) -> float:
    """Round to the nearest fp32, ties to even; too large becomes infinity."""
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def next_up(value: float, steps: int = 1) -> float:
    """The fp32 number `steps` above a positive one."""
    return struct.unpack("<f", struct.pack("<i", struct.unpack("<i", struct.pack("<f", value))[0] + steps))[0]


def bf16(value: float) -> float:
    """Round to the nearest bf16, ties to even."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return struct.unpack("<f", struct.pack("<I", (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000))[0]


def minifloat(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """Value of a sign-exponent-mantissa code with subnormals and no infinities."""
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    return sign * ((1 + mantissa) * 2.0 ** (exponent - bias) if exponent else mantissa * 2.0 ** (1 - bias))


def e2m1_value(code: int) -> float:
    return minifloat(code, 2, 1)


def e4m3_value(byte: int) -> float:
    """E4M3: all ones is NaN, so 448 is the largest number."""
    return math.nan if byte & 0x7F == 0x7F else minifloat(byte, 4, 3)


E2M1_TABLE = [e2m1_value(code) for code in range(8)]
E4M3_TABLE = [e4m3_value(byte) for byte in range(127)]


def nearest_code(value, table: list[float]) -> int:
    """Index of the table entry nearest to a non-negative number; ties to the even index; saturating."""
    above = bisect.bisect_left(table, value)
    if above in (0, len(table)):
        return min(above, len(table) - 1)
    left, right = Fraction(value) - Fraction(table[above - 1]), Fraction(table[above]) - Fraction(value)
    if left == right:
        return above if above % 2 == 0 else above - 1
    return above if right < left else above - 1


def e2m1_code(value) -> int:
    """Nearest E2M1 code of a float (sign of zero kept, NaN is 7) or of a Fraction."""
    if value != value:
        return 7
    return nearest_code(abs(value), E2M1_TABLE) + 8 * is_negative(value)


def e4m3_code(value) -> int:
    return nearest_code(abs(value), E4M3_TABLE) + 128 * is_negative(value)


def is_negative(value) -> bool:
    return value < 0 if isinstance(value, Fraction) else math.copysign(1.0, value) < 0


def ue8m0_ceil(value: float) -> int:
    """Byte of the smallest power of two that is not below a positive number."""
    exponent = -127
    while Fraction(2) ** exponent < Fraction(value):
        exponent += 1
    return exponent + 127


def ue8m0_value(byte: int) -> Fraction:
    return Fraction(2) ** (byte - 127)


def fp8_scale_byte(amax: float) -> int:
    """2^ceil(log2(max(amax, 1e-4) * (1/448))), the product in fp32."""
    return ue8m0_ceil(f32(max(amax, f32(1e-4)) * f32(1 / 448)))


def mxfp4_scale_byte(amax: float) -> int:
    """2^ceil(log2(max(amax, 6 * 2^-126) * (1/6))), the product in fp32."""
    return ue8m0_ceil(f32(max(amax, 6 * 2.0**-126) * f32(1 / 6)))


def over_power_of_two(value: float, byte: int):
    """value / 2^(byte - 127), exact; a zero keeps its sign."""
    return Fraction(value) / ue8m0_value(byte) if value else value


def groups_of(row: list[float], size: int) -> list[list[float]]:
    return [row[start : start + size] for start in range(0, len(row), size)]


def quant_fp8(row: list[float], group: int) -> tuple[list[int], list[int]]:
    """E4M3 bytes and UE8M0 bytes of one row."""
    codes, scales = [], []
    for values in groups_of(row, group):
        scales.append(fp8_scale_byte(max(map(abs, values))))
        codes += [e4m3_code(over_power_of_two(value, scales[-1])) for value in values]
    return codes, scales


def quant_fp8_fp32_scale(row: list[float], group: int) -> tuple[list[int], list[float]]:
    """E4M3 bytes and fp32 scales of one row."""
    codes, scales = [], []
    for values in groups_of(row, group):
        scales.append(f32(max(max(map(abs, values)), f32(1e-4)) / 448))
        codes += [e4m3_code(f32(value / scales[-1])) for value in values]
    return codes, scales


def pack(codes: list[int]) -> list[int]:
    """Two 4-bit codes a byte, the even element in the low nibble."""
    return [codes[i] + 16 * codes[i + 1] for i in range(0, len(codes), 2)]


def quant_mxfp4(row: list[float]) -> tuple[list[int], list[int]]:
    """Packed E2M1 bytes and UE8M0 bytes of one row, groups of 32."""
    codes, scales = [], []
    for values in groups_of(row, 32):
        scales.append(mxfp4_scale_byte(max(map(abs, values))))
        codes += [e2m1_code(over_power_of_two(value, scales[-1])) for value in values]
    return pack(codes), scales


def nvfp4_global_scale(values: list[float]) -> float:
    return max(f32(max(map(abs, values), default=0.0) / 2688), 2.0**-126)


def quant_nvfp4(row: list[float], global_scale: float) -> tuple[list[int], list[int]]:
    """Packed E2M1 bytes and E4M3 scale bytes of one row, blocks of 16."""
    codes, scales = [], []
    for values in groups_of(row, 16):
        scales.append(e4m3_code(f32(max(map(abs, values)) / f32(6 * global_scale))))
        step = f32(e4m3_value(scales[-1]) * global_scale)
        codes += [e2m1_code(f32(value / step)) if scales[-1] else 0 for value in values]
    return pack(codes), scales


def bytes_of(tensor: torch.Tensor) -> list:
    """Nested lists of the bytes of a one-byte dtype."""
    return tensor.view(torch.uint8).tolist()
