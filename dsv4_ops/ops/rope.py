"""Rotary embedding on the trailing dimensions, interleaved pairs (2i, 2i+1), from a table of cosines and sines."""

import math

import torch
from torch import Tensor


def rope_table(
    rope_dim: int,
    max_positions: int,
    theta: float,
    *,
    yarn_factor: float = 1.0,
    original_positions: int = 0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Tensor:
    """Table [max_positions, rope_dim] fp32 of (cos, sin) pairs: angle = fp32(position) * fp32(frequency).

    YaRN (yarn_factor > 1) interpolates the low frequencies between beta_slow and beta_fast rotations over
    `original_positions`; cosines and sines are not scaled (no mscale). Always computed on the CPU, so that every device
    reads the same bits.
    """
    index = torch.arange(0, rope_dim, 2, dtype=torch.float32)
    frequency = 1.0 / (theta ** (index / rope_dim))
    if yarn_factor > 1.0:
        low, high = (
            rope_dim * math.log(original_positions / (beta * 2 * math.pi)) / (2 * math.log(theta))
            for beta in (beta_fast, beta_slow)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), rope_dim - 1)
        span = high - low if high != low else 0.001
        ramp = ((torch.arange(rope_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
        frequency = frequency / yarn_factor * ramp + frequency * (1 - ramp)
    angle = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()), dim=-1).flatten(-2)


def apply_rope(x: Tensor, table: Tensor, positions: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate the last `table.shape[1]` dimensions of x by the angle of each row's position; fp32 in and out.

    x [B, S, ..., D] fp32, positions [B, S] int32; rows at a negative position are rotated as position 0 (their result
    is never used). `inverse` turns the other way.
    """
    rope_dim = table.shape[1]
    rows = table[positions.clamp_min(0).long()]
    rows = rows.view(*positions.shape, *(1,) * (x.dim() - positions.dim() - 1), rope_dim)
    cos, sin = rows[..., 0::2], rows[..., 1::2]
    if inverse:
        sin = -sin
    keep, pairs = x[..., : x.shape[-1] - rope_dim], x[..., x.shape[-1] - rope_dim :].unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((keep, rotated), dim=-1)
