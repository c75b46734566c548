"""Inputs of the norm and of the gated activation, and the judge of values that may be NaN."""

import torch
from torch import Tensor

from graph_tests.checks import assert_bits_equal

EPS, LIMIT = 1e-6, 40.0
BF16 = torch.bfloat16


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(low: int, high: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


def same_values(actual: Tensor, expected: Tensor) -> None:
    """The same bits, but any NaN for a NaN (CPUs and GPUs make NaNs of different bits)."""
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan), "NaN in other places"
    assert_bits_equal(actual.where(~nan, 0.0), expected.where(~nan, 0.0))


def exact_rows(rows: int, width: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    """x and weight whose sums of squares are exact in fp32 in any order: integers up to 8 * 3 (7168 * 24^2 < 2^24; in
    wider rows up to 3), of different sizes in blocks of 16, so that groups get different scales."""
    x = integers(-3, 4, rows, width, seed=rows * 31 + width)
    if width <= 7168:
        x *= 2.0 ** integers(0, 4, rows, (width + 15) // 16, seed=width).repeat_interleave(16, -1)[:, :width]
    return x.to(dtype), integers(1, 9, width, seed=1).div(4).to(dtype)


def random_rows(rows: int, width: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    """Normal rows of many magnitudes; block amaxes differ within a row too."""
    x = normal(rows, width, seed=rows) * normal(rows, 1, seed=2).mul(3).exp()
    x *= normal(1, (width + 15) // 16, seed=3).exp().repeat_interleave(16, -1)[:, :width]
    return x.to(dtype), normal(width, seed=4).to(dtype)


def hard_rows(width: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    """Zeros; NaN; infinity (whose 1 / rms is 0); squares that are too small, or too large, for fp32; finite rows."""
    x, weight = exact_rows(7, width)
    x = x.float()
    x[0] = 0
    x[1, width // 3] = float("nan")
    x[2, width // 2] = float("-inf")
    x[3] *= 2.0**-90
    x[4] *= 2.0**70
    return x.to(dtype), weight.to(dtype)


def exact_gate_up(rows: int, inner: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor, float]:
    """gate_up, route_weight, limit: silu(gate) is 0 or gate, as exp(-gate) is lost beside 1 for gates from 20 up. Some
    gates and ups exceed the limit."""
    gate = integers(20, 50, rows, inner, seed=rows + inner) * integers(0, 5, rows, inner, seed=inner).clamp_max(1)
    up = integers(-50, 51, rows, inner, seed=rows + inner + 1) * 2.0 ** integers(-6, 2, rows, inner, seed=7)
    route_weight = integers(1, 9, rows, seed=rows) / 8
    return torch.cat((gate, up), -1).to(dtype), route_weight, LIMIT


def random_gate_up(rows: int, inner: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor, float]:
    gate_up = normal(rows, 2 * inner, seed=rows + inner) * 6
    return gate_up.to(dtype), normal(rows, seed=5).sigmoid(), 10.0


def hard_gate_up(inner: int, dtype: torch.dtype, limit: float = 10.0) -> tuple[Tensor, Tensor, float]:
    """NaN and infinities in gate and up, gates from -120 to 20, zeros, route weights 0 and infinity."""
    gate_up, route_weight, _ = random_gate_up(9, inner, torch.float32)
    nan, infinity = float("nan"), float("inf")
    gate_up[0, 3], gate_up[1, inner + 3] = nan, nan
    gate_up[2, 0], gate_up[2, 1] = infinity, -infinity
    gate_up[3, inner], gate_up[3, -1] = infinity, -infinity
    gate_up[4, :inner] = torch.linspace(-120, 20, inner)
    gate_up[5] = 0
    route_weight[6], route_weight[7] = 0, infinity
    return gate_up.to(dtype), route_weight, limit


def interleaved(gate_up: Tensor) -> Tensor:
    """All gates, then all ups -> pairs (gate, up)."""
    return torch.stack(gate_up.chunk(2, dim=-1), dim=-1).flatten(-2)
