"""Random quantised operands from random bytes, with their values in fp64 decoded from the format definitions."""

import torch

from graph_tests.ops import scalar

FP8 = torch.float8_e4m3fn
E4M3 = torch.tensor([scalar.e4m3_value(byte) for byte in range(256)], dtype=torch.float64)
E2M1 = torch.tensor([scalar.e2m1_value(code) for code in range(16)], dtype=torch.float64)
E4M3_CODES = [byte for byte in range(256) if byte & 0x7F != 0x7F]
E4M3_INTEGERS = [scalar.e4m3_code(float(value)) for value in range(-8, 9)]


def pick(choices: list[int], shape: tuple, generator) -> torch.Tensor:
    return torch.tensor(choices, dtype=torch.uint8)[torch.randint(len(choices), shape, generator=generator)]


def spread(scale: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    return scale.repeat_interleave(group, -1)[..., :columns]


def ue8m0(byte: torch.Tensor) -> torch.Tensor:
    return 2.0 ** (byte.double() - 127)


def fp4_values(packed: torch.Tensor) -> torch.Tensor:
    codes = torch.stack((packed % 16, packed // 16), dim=-1).flatten(-2)
    return E2M1[codes.long()]


def fp8_rows(shape: tuple, generator, exact: bool, group: int):
    """x, x_scale and their values in fp64. `exact`: small integers times 1/2, 1 or 2, whose sums are exact in fp32."""
    x = pick(E4M3_INTEGERS if exact else E4M3_CODES, shape, generator)
    scale = pick([126, 127, 128] if exact else list(range(110, 140)), (*shape[:-1], shape[-1] // group), generator)
    return (x.view(FP8), scale), E4M3[x.long()] * spread(ue8m0(scale), group, shape[-1])


def fp8_weight(n: int, k: int, generator, exact: bool, *, fp32_scale: bool = False):
    codes = pick(E4M3_INTEGERS if exact else E4M3_CODES, (n, k), generator)
    shape = (-(-n // 128), -(-k // 128))
    scale = pick([126, 127, 128] if exact else list(range(110, 140)), shape, generator)
    factor = torch.rand(shape, generator=generator).double() + 0.5 if fp32_scale else ue8m0(scale)
    values = E4M3[codes.long()] * spread(factor.repeat_interleave(128, 0)[:n], 128, k)
    return (codes.view(FP8), factor.float() if fp32_scale else scale), values


def mxfp4_weight(n: int, k: int, generator, exact: bool):
    packed = pick(list(range(256)), (n, k // 2), generator)
    scale = pick([126, 127, 128] if exact else list(range(110, 140)), (n, k // 32), generator)
    return (packed, scale), fp4_values(packed) * spread(ue8m0(scale), 32, k)


def nvfp4(shape: tuple, generator, exact: bool, global_shape: tuple):
    packed = pick(list(range(256)), (*shape[:-1], shape[-1] // 2), generator)
    halves = [scalar.e4m3_code(value) for value in (0.0, 0.5, 1.0, 2.0)]
    scale = pick(halves if exact else E4M3_CODES[:127], (*shape[:-1], shape[-1] // 16), generator)
    factor = 2.0 ** torch.randint(-4, 4, global_shape, generator=generator)
    factor = factor if exact else factor * (1 + torch.rand(global_shape, generator=generator))
    values = fp4_values(packed) * spread(E4M3[scale.long()], 16, shape[-1])
    return (packed, scale.view(FP8), factor), values * factor.double()
