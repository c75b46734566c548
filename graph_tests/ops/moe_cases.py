"""A small layer of experts in every format, with its values in fp64, and the configuration of its judge."""

import torch
from transformers import DeepseekV4Config

from graph_tests.ops.operands import fp8_rows, fp8_weight, mxfp4_weight, nvfp4

F32, BF16, FP8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
EXPERTS, K, HIDDEN, WIDTH, LIMIT, SCALE = 8, 2, 64, 96, 2.5, 1.5
FORMATS = ["dense", "fp8", "mxfp4", "nvfp4"]
IDS = {"dense": 1, "fp8": 2, "mxfp4": 2, "nvfp4": 3}  # place of ids; all up to the weights after it have rows


def config() -> DeepseekV4Config:
    made = DeepseekV4Config(
        vocab_size=50,
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=K,
        num_attention_heads=2,
        routed_scaling_factor=SCALE,
        swiglu_limit=LIMIT,
        num_hidden_layers=2,
    )
    made._experts_implementation = "eager"
    return made


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantised(kind: str, rows: int):
    """Arguments of moe_<kind> up to ids, weight tensors, and x [T, d], w1, w3, w2 [E, N, K] in fp64; sums are exact."""
    generator = torch.Generator().manual_seed(5)
    if kind == "nvfp4":
        x, x64 = nvfp4((rows, HIDDEN), generator, True, (rows, 1))
    else:
        x, x64 = fp8_rows((rows, HIDDEN), generator, True, 32)
    tensors, values = [], []
    for n, k in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)):
        if kind == "nvfp4":
            made = [nvfp4((n, k), generator, True, ()) for _ in range(EXPERTS)]
        else:
            made = [(fp8_weight if kind == "fp8" else mxfp4_weight)(n, k, generator, True) for _ in range(EXPERTS)]
        parts = zip(*(packed for packed, _ in made), strict=True)
        tensors += [torch.stack([part.view(torch.uint8) if part.dim() else part for part in some]) for some in parts]
        values.append(torch.stack([value for _, value in made]))
    dtypes = {"fp8": (FP8, None), "mxfp4": (None, None), "nvfp4": (None, FP8, None)}[kind]
    tensors = [part.view(dtypes[i % len(dtypes)] or part.dtype) for i, part in enumerate(tensors)]
    return x, tensors, x64, values


def make(kind: str, rows: int, *, dtype: torch.dtype = BF16, ids: torch.Tensor | None = None):
    """Arguments of moe_<kind>, and x, w1, w3, w2 in fp64. g and u reach the limit."""
    if ids is None:
        ids = torch.randint(EXPERTS, (rows, K), generator=torch.Generator().manual_seed(6))
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(7))
    if kind == "dense":
        w1, w3 = (normal(EXPERTS, WIDTH, HIDDEN, seed=seed).div(4).to(dtype) for seed in (1, 2))
        w2, x = normal(EXPERTS, HIDDEN, WIDTH, seed=3).div(4).to(dtype), normal(rows, HIDDEN, dtype=dtype)
        return (x, ids.int(), weights, w1, w3, w2, LIMIT), tuple(a.double() for a in (x, w1, w3, w2))
    x, tensors, x64, values = quantised(kind, rows)
    return (*x, ids.int(), weights, *tensors, LIMIT), (x64, *values)
