"""Arguments of the ops moe_<format>, from random bytes; what must be of the released size is made quickly."""

import torch
from torch import Tensor

from graph_tests.ops.operands import E4M3_CODES, fp8_rows, fp8_weight, mxfp4_weight, nvfp4, pick

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
FLASH, PRO = (4096, 2048), (7168, 3072)


def choose(rows: int, experts: int, k: int, seed: int = 0) -> Tensor:
    """k different experts for each row."""
    scores = torch.rand(rows, experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(k).indices.int()


def weight(kind: str, experts: int, n: int, k: int, generator, exact: bool) -> list[Tensor]:
    """One projection of all experts: the weight, then its scales."""
    if kind == "dense":
        return [(torch.randn(experts, n, k, generator=generator) * k**-0.5).to(BF16)]
    if kind == "nvfp4":
        (packed, scale, factor), _ = nvfp4((experts, n, k), generator, exact, (experts, 1, 1))
        return [packed, scale, factor.flatten() * 2.0**-4]
    make = fp8_weight if kind == "fp8" else mxfp4_weight
    made = [make(n, k, generator, exact)[0] for _ in range(experts)]
    parts = [torch.stack([part.view(torch.uint8) for part in some]) for some in zip(*made, strict=True)]
    return [parts[0].view(FP8) if kind == "fp8" else parts[0], parts[1]]


def make(kind: str, ids: Tensor, d: int, inner: int, experts: int, *, exact: bool = True, limit: float = 2.5) -> tuple:
    """Arguments of moe_<kind>. `exact`: small integers, whose sums are exact; gates and ups reach the limit."""
    generator = torch.Generator().manual_seed(5)
    rows = len(ids)
    if kind == "dense":
        x = [torch.randn(rows, d, generator=generator).to(BF16)]
    elif kind == "nvfp4":
        x = list(nvfp4((rows, d), generator, exact, (rows, 1))[0])
    else:
        x = list(fp8_rows((rows, d), generator, exact, 128)[0])
    shapes = ((inner, d), (inner, d), (d, inner))
    weights = [part for n, k in shapes for part in weight(kind, experts, n, k, generator, exact)]
    return (*x, ids, torch.rand(ids.shape, generator=generator) + 0.1, *weights, limit)


def released(kind: str, ids: Tensor, d: int, inner: int, experts: int, device: str = "cpu") -> tuple:
    """The same from bytes that are not looked at (no NaN), of normal size; on the device, beyond what a CPU holds."""
    generator = torch.Generator(device).manual_seed(6)

    def codes(*shape: int) -> Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator, device=device)

    def small(*shape: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator, device=device)

    rows, tensors = len(ids), []
    x = fp8_rows((rows, d), torch.Generator().manual_seed(7), True, 128)[0]
    if kind == "nvfp4":
        x = nvfp4((rows, d), torch.Generator().manual_seed(7), True, (rows, 1))[0]
    for n, k in ((inner, d), (inner, d), (d, inner)):
        if kind == "mxfp4":
            tensors += [codes(experts, n, k // 2), small(experts, n, k // 32, low=116, high=121)]
        else:
            tensors += [codes(experts, n, k // 2), small(experts, n, k // 16, low=0x30, high=0x40).view(FP8)]
            tensors += [torch.full((experts,), 2.0**-8, device=device)]
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(8)) + 0.1
    return (*(part.to(device) for part in x), ids.to(device), weights.to(device), *tensors, 10.0)


def spoil(kind: str, arguments: tuple) -> tuple:
    """The same with NaN in row 3, and something that is not finite in row 4 and, of dense ones, 5."""
    x, *rest = (argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments)
    if kind == "dense":
        x[3, 7], x[4, 200], x[5, 0] = float("nan"), float("inf"), float("-inf")
    elif kind == "nvfp4":
        rest[0].view(torch.uint8)[3, 5] = 0x7F
        rest[1][4] = float("nan")
    else:
        x.view(torch.uint8)[3, 7] = 0x7F
        rest[0][4, 1] = 255
    return (x, *rest)


def any_codes(shape: tuple) -> Tensor:
    """E4M3 of all magnitudes."""
    return pick(E4M3_CODES, shape, torch.Generator().manual_seed(9)).view(FP8)
