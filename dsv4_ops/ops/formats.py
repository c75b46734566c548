"""Number formats of DeepSeek-V4 as plain torch functions, exact on every input. The ops are composed of these.

E2M1   4 bits: 0 .5 1 1.5 2 3 4 6 and a sign (bit 3); two codes a byte, the even element in the low nibble
E4M3   8 bits, largest finite value 448
UE8M0  8 bits, value 2^(byte - 127), 255 is NaN; travels as uint8
"""

from functools import cache

import torch
from torch import Tensor

E2M1_MAX = 6.0
E4M3_MAX = 448.0
FP8 = torch.float8_e4m3fn
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP8_AMAX_FLOOR = 1e-4  # smallest amax that an FP8 group is scaled for
MXFP4_AMAX_FLOOR = 6.0 * 2.0**-126  # smallest amax of an MXFP4 group: the scale byte is at least 1


def encode_e2m1(x: Tensor) -> Tensor:
    """fp32 -> 4-bit codes in uint8: nearest, ties to even code, saturating at 6; NaN becomes 6; zero keeps its sign."""
    magnitude = x.abs()
    code = (magnitude > 0.25).to(torch.uint8)
    for bound, tie_goes_up in ((0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False)):
        code = code + (magnitude >= bound if tie_goes_up else magnitude > bound).to(torch.uint8)
    code = code + torch.signbit(x).to(torch.uint8) * 8
    return torch.where(torch.isnan(x), 7, code)


def decode_e2m1(codes: Tensor) -> Tensor:
    """4-bit codes in uint8 -> fp32."""
    magnitude = (codes & 7).to(torch.int32)
    exponent, mantissa = magnitude >> 1, (magnitude & 1).float()
    value = torch.where(exponent == 0, 0.5 * mantissa, (1.0 + 0.5 * mantissa) * pow2(exponent - 1))
    return torch.where(codes >= 8, -value, value)


def pack_e2m1(codes: Tensor) -> Tensor:
    """[..., K] codes -> [..., K/2] bytes, even element in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """[..., K/2] bytes -> [..., K] codes."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def cast_e4m3(x: Tensor) -> Tensor:
    """fp32 -> E4M3, nearest even, saturating at 448 (NaN stays NaN)."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(FP8)


def pow2(exponent: Tensor) -> Tensor:
    """2^exponent in fp32 for int32 exponents of normal numbers (-126..127)."""
    return ((exponent + 127) << 23).view(torch.float32)


def ceil_ue8m0(x: Tensor) -> Tensor:
    """Positive normal fp32 -> byte of the smallest power of two that is >= x (read off the bits, no log).

    Infinity and NaN of either sign give 255, so that a broken activation stays visible in FP4, which has no NaN.
    """
    bits = x.view(torch.int32) & 0x7FFFFFFF
    return ((bits >> 23) + ((bits & 0x7FFFFF) != 0)).clamp_max(255).to(torch.uint8)


def decode_ue8m0(byte: Tensor) -> Tensor:
    """UE8M0 byte -> fp32: the byte is the exponent. Byte 0 is 2^-127, a subnormal, and 255 is NaN: both set bit 22."""
    special = (byte + 1) < 2  # uint8 wraps: 255 and 0
    return ((byte.to(torch.int32) << 23) + (special.to(torch.int32) << 22)).view(torch.float32)


def fp8_group_scale(amax: Tensor) -> Tensor:
    """amax of a group -> UE8M0 byte of 2^ceil(log2(max(amax, 1e-4) / 448))."""
    return ceil_ue8m0(amax.clamp_min(FP8_AMAX_FLOOR) * (1.0 / E4M3_MAX))


def mxfp4_group_scale(amax: Tensor) -> Tensor:
    """amax of a group -> UE8M0 byte of 2^ceil(log2(max(amax, 6 * 2^-126) / 6))."""
    return ceil_ue8m0(amax.clamp_min(MXFP4_AMAX_FLOOR) * (1.0 / E2M1_MAX))


def hadamard(x: Tensor) -> Tensor:
    """Walsh-Hadamard transform of the last dimension (a power of two), scaled by size^-0.5, in the dtype of x."""
    size = x.shape[-1]
    shape = x.shape
    width = 1
    while width < size:
        pairs = x.unflatten(-1, (size // (2 * width), 2, width))
        x = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), dim=-2).reshape(
            shape
        )
        width *= 2
    return x * size**-0.5


# Tables over a byte, for CPU kernels that read many codes: one pass instead of ten. A pair of E2M1 values is one int64.
BYTES = torch.arange(256, dtype=torch.uint8, device="cpu")
E2M1_PAIRS = decode_e2m1(unpack_e2m1(BYTES[:, None])).view(torch.int64).flatten()
UE8M0_VALUES = decode_ue8m0(BYTES)


@cache
def _cuda_copy(table: str, device: torch.device) -> Tensor:
    """A table on a GPU, copied once: a copy from the host would break the capture of a CUDA graph."""
    return globals()[table].to(device)


def _table(name: str, device: torch.device) -> Tensor:
    return _cuda_copy(name, device) if device.type == "cuda" else globals()[name].to(device)


def look_up_ue8m0(byte: Tensor) -> Tensor:
    """decode_ue8m0 by table."""
    return _table("UE8M0_VALUES", byte.device).index_select(0, byte.flatten().int()).view(byte.shape)


def look_up_e2m1_pairs(packed: Tensor) -> Tensor:
    """decode_e2m1(unpack_e2m1(packed)) by table: [..., K/2] uint8 -> [..., K] fp32."""
    codes = packed.flatten().int()
    return _table("E2M1_PAIRS", packed.device).index_select(0, codes).view(packed.shape).view(torch.float32)


def decode_finite_e4m3(x: Tensor) -> Tensor:
    """x.float() for E4M3 without NaN codes, 15 times as fast on a CPU: the bits are moved into fp16 and rescaled.

    fp16 has one more exponent bit and a bias that is larger by 8: sign and code land in place after a shift by 7, and
    the sign's copy in bit 14 is cleared. A NaN code would read as 480. Weights are checked while loading; a quantised
    group that held NaN has a NaN scale.
    """
    bits = x.view(torch.int8).to(torch.int16)
    return bits.bitwise_left_shift_(7).bitwise_and_(~(1 << 14)).view(torch.float16).float().mul_(256.0)
