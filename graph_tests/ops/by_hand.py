"""Number formats, RoPE and Hadamard transform written out a second time, slowly: the judges of packed bytes."""

import math

import torch

E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def rope_by_hand(x, row):
    """x [D] fp64, row [R] of (cos, sin) pairs -> the last R elements turned as complex numbers, fp64."""
    out, rope_dim = x.double().clone(), len(row)
    for i in range(0, rope_dim, 2):
        at = len(x) - rope_dim + i
        turned = complex(*x[at : at + 2].double()) * complex(*row[i : i + 2].double())
        out[at], out[at + 1] = turned.real, turned.imag
    return out


def hadamard_by_hand(x):
    """x [..., D] -> bf16: Sylvester's matrix from the parity of the common bits, fp64 sums, one rounding."""
    size = x.shape[-1]
    matrix = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return (x.double() @ torch.tensor(matrix, dtype=torch.float64) / math.sqrt(size)).bfloat16()


def fp8_by_hand(x):
    """x [D] -> E4M3 bytes and the 4 bytes of the fp32 scale max(amax, 1e-4) / 448."""
    scale = x.float().abs().max().clamp_min(1e-4) / 448
    return e4m3_bytes(x.float() / scale), scale.view(1).view(torch.uint8)


def e4m3_bytes(values):
    return values.to(torch.float8_e4m3fn).view(torch.uint8)


def fp4_by_hand(x):
    """x [D] -> D/2 bytes of code pairs (nearest, ties to the even code), D/32 scale bytes 2^ceil(log2(amax / 6))."""
    codes, scales = [], []
    for group in x.double().split(32):
        exponent = math.ceil(math.log2(group.abs().max().item() / 6))
        for value in (group * 2.0**-exponent).tolist():
            distance = [abs(abs(value) - level) for level in E2M1_LEVELS]
            nearest = [code for code in range(8) if distance[code] == min(distance)]
            codes.append(min(nearest, key=lambda code: code % 2) + 8 * (math.copysign(1, value) < 0))
        scales.append(exponent + 127)
    pairs = [low + 16 * high for low, high in zip(codes[::2], codes[1::2], strict=True)]
    return torch.tensor(pairs), torch.tensor(scales)


def fp4_values(data, scales):
    """uint8 code pairs [..., D/2] and scale bytes [..., D/32] -> fp64 [..., D]."""
    levels = torch.tensor([*E2M1_LEVELS, *(-level for level in E2M1_LEVELS)], dtype=torch.float64)
    values = levels[torch.stack((data & 15, data >> 4), dim=-1).flatten(-2).long()]
    return values * torch.exp2(scales.double() - 127).repeat_interleave(32, dim=-1)
