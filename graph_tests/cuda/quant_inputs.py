"""Inputs of the quantisers: activations of all magnitudes, and quotients that are nearly ties between two codes.

The kernels divide by a product with a reciprocal in two parts, which must land on the right side of a tie. By theory it
can fail only for divisors whose significand is near a multiple of 2^18 / 2^23; `divisors` has all of those, and
`every_divisor` all significands, for tests that compare with the reference on the GPU.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

E2M1_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between two codes
E4M3_TIES = tuple(odd * 2.0**-10 for odd in range(1, 32, 2)) + tuple(odd * 4.0 for odd in range(17, 32, 2))


def activations(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Values of many magnitudes, with groups of zeros, the smallest and largest numbers, infinity and NaN."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    x = torch.randn(rows, width, generator=generator) * torch.randn(rows, 1, generator=generator).mul(6).exp()
    if rows > 2:
        x[0] = 0
        x[1, ::7] = 2.0**-130
        x[2, 3], x[2, width // 2] = float("nan"), float("-inf")
        x[-1, 0] = torch.finfo(dtype).max
    return x.to(dtype)


def stepped(values: Tensor, steps: int) -> Tensor:
    """The fp32 numbers that lie `steps` above positive ones."""
    return (values.view(torch.int32) + steps).view(torch.float32)


def divisors() -> Tensor:
    """[1312] fp32 from 1 to 2: those within 8 steps of a multiple of 2^-5, and others."""
    one = torch.ones(()).view(torch.int32)
    near = torch.arange(33)[:, None] * 2**18 + torch.arange(-8, 9)
    others = torch.randint(2**23, (751,), generator=torch.Generator().manual_seed(0))
    bits = torch.cat((near.flatten()[8:-8], others, torch.arange(16)))
    return (one + bits.clamp(0, 2**23 - 1)).int().view(torch.float32)


def every_divisor(chunk: int) -> Iterator[Tensor]:
    """All fp32 numbers in [1, 2), on the GPU, `chunk` at a time."""
    one = torch.ones((), device="cuda").view(torch.int32)
    for first in range(0, 2**23, chunk):
        yield (one + torch.arange(first, first + chunk, device="cuda")).int().view(torch.float32)


def near_ties(divisor: Tensor, ties: tuple[float, ...], steps: int) -> Tensor:
    """[N, len(ties)] fp32 numbers `steps` above divisor [N] * tie, of alternating sign."""
    values = stepped(divisor[:, None] * divisor.new_tensor(ties), steps)
    return values * divisor.new_tensor([1.0, -1.0]).repeat(len(ties))[: len(ties)]
