"""Arguments of the hyper-connection ops, of any width and number of streams."""

import torch

NORM_EPS, EPS, ITERATIONS = 1e-6, 1e-6, 20
NAMES = (
    "sinkhorn",
    "hc_post",
    "hc_head",
    "hc_pre",
    "hc_pre_rms_norm",
    "hc_pre_rms_norm_quant_fp8",
    "hc_pre_rms_norm_quant_nvfp4",
    "hc_post_pre",
    "hc_post_pre_rms_norm",
    "hc_post_pre_rms_norm_quant_fp8",
    "hc_post_pre_rms_norm_quant_nvfp4",
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments_of(
    name: str,
    rows: tuple[int, ...],
    n: int = 4,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    norm_dtype: torch.dtype | None = None,
    group: int = 32,
    layout=lambda tensor: tensor,
) -> tuple:
    """Arguments of op `name` for leading dimensions `rows`; `layout` is applied to everything that has them."""
    if name == "sinkhorn":
        return layout(random(*rows, n, n)), EPS, ITERATIONS
    outputs = n if name == "hc_head" else (2 + n) * n
    fn, base = random(outputs, n * dim, seed=1) * (n * dim) ** -0.5, random(outputs, seed=2)
    x = layout(random(*rows, n, dim, seed=7, dtype=dtype))
    if name == "hc_head":
        return x, fn, torch.tensor([1.5]), base, NORM_EPS, EPS
    before = layout(random(*rows, dim, seed=6, dtype=dtype)), x, layout(random(*rows, n).abs())
    before += (layout(random(*rows, n, n, seed=5).softmax(-1)),)
    if name == "hc_post":
        return before
    arguments = (*(before if "post_pre" in name else (x,)), fn, torch.tensor([0.7, 1.3, 2.0]), base)
    if "rms_norm" in name:
        arguments += (random(dim, seed=11, dtype=norm_dtype or dtype),)
    return (*arguments, NORM_EPS, EPS, ITERATIONS, *((group,) if name.endswith("fp8") else ()))
