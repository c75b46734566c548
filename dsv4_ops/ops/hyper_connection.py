"""Manifold-constrained hyper-connections: n residual streams, mixed before and after every sub-layer.

    m    = (flat(x) @ fn^T) * rsqrt(mean(flat(x)^2) + norm_eps)               [(2 + n) * n]
    pre  = sigmoid(m[:n] * scale[0] + base[:n]) + hc_eps
    post = 2 * sigmoid(m[n:2n] * scale[1] + base[n:2n])
    comb = sinkhorn(m[2n:] * scale[2] + base[2n:])                            [n, n], doubly stochastic
    y    = sum_j pre_j x_j,    and after the sub-layer f:    x'_k = post_k f(y) + sum_j comb_jk x_j

Everything is fp32 inside; y and x' are rounded once, to the dtype of the streams. hc_eps is added to pre, to the
softmax and to every denominator of Sinkhorn's iteration, whose last step is a column normalisation: a wrong eps or
count hardly moves the logits of a model, so only tests of these ops can see it.

Shapes: x [..., n, d] bf16|f32, n <= 16; fn f32 [(2 + n) * n, n * d]; scale f32 [3]; base f32 [(2 + n) * n]; post f32
[..., n]; comb f32 [..., n, n]; f [..., d] in the dtype of x (what the sub-layer returned).
"""

from functools import partial
from math import prod

import torch
from torch import Tensor

from dsv4_ops.ops.norm import rms_norm_reference
from dsv4_ops.registry import Inline, define, describe, expect

MAX_STREAMS = 16
# Partial sums of the CUDA kernels (csrc/hyper_connection/hyper_connection.h): one for 64 columns of every stream, from
# 2048 tokens on for 8 times as many.
SPLIT_COLUMNS, SPLITS_PER_GROUP, MANY_TOKENS = 64, 8, 2048


def _check_sinkhorn(logits: Tensor, eps: float, iterations: int) -> None:
    n = logits.shape[-1]
    square = logits.dtype == torch.float32 and logits.shape[-2] == n and 1 <= n <= MAX_STREAMS
    expect(square, "sinkhorn", f"logits must be [..., n, n] float32 with n <= {MAX_STREAMS}, got {describe(logits)}")
    expect(iterations >= 1, "sinkhorn", f"iterations must be at least 1, got {iterations}")


def _check_streams(op: str, x: Tensor) -> None:
    expect(
        x.dim() >= 2 and 1 <= x.shape[-2] <= MAX_STREAMS and x.dtype in (torch.bfloat16, torch.float32),
        op,
        f"x must be [..., n, d] bfloat16 or float32 with n <= {MAX_STREAMS}, got {describe(x)}",
    )


def _check_mix(op: str, x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, rows: int, scales: int) -> None:
    for name, tensor, shape in (
        ("fn", fn, (rows, x.shape[-2] * x.shape[-1])),
        ("scale", scale, (scales,)),
        ("base", base, (rows,)),
    ):
        expect(
            tuple(tensor.shape) == shape and tensor.dtype == torch.float32,
            op,
            f"{name} must be {list(shape)} float32 for x {describe(x)}, got {describe(tensor)}",
        )


def _check_pre(op: str, x, fn, scale, base, norm_eps, hc_eps, iterations) -> None:
    _check_streams(op, x)
    _check_mix(op, x, fn, scale, base, (2 + x.shape[-2]) * x.shape[-2], 3)
    expect(iterations >= 1, op, f"iterations must be at least 1, got {iterations}")


def _check_post(op: str, f: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> None:
    _check_streams(op, x)
    n, d = x.shape[-2:]
    for name, tensor, shape, dtype in (
        ("f", f, (d,), x.dtype),
        ("post", post, (n,), torch.float32),
        ("comb", comb, (n, n), torch.float32),
    ):
        expect(
            tuple(tensor.shape[-len(shape) :]) == shape and tensor.dtype == dtype,
            op,
            f"{name} must be [..., {', '.join(map(str, shape))}] {dtype} for x {describe(x)}, got {describe(tensor)}",
        )


def _check_post_pre(op: str, f, x, post, comb, fn, scale, base, norm_eps, hc_eps, iterations) -> None:
    _check_post(op, f, x, post, comb)
    _check_pre(op, x, fn, scale, base, norm_eps, hc_eps, iterations)


def _check_norm_weight(op: str, x: Tensor, norm_weight: Tensor) -> None:
    expect(
        tuple(norm_weight.shape) == (x.shape[-1],) and norm_weight.dtype in (torch.bfloat16, torch.float32),
        op,
        f"norm_weight must be [{x.shape[-1]}] bfloat16 or float32, got {describe(norm_weight)}",
    )


def check_pre_rms_norm(op: str, x, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations) -> None:
    _check_pre(op, x, fn, scale, base, norm_eps, hc_eps, iterations)
    _check_norm_weight(op, x, norm_weight)


def check_post_pre_rms_norm(
    op: str, f, x, post, comb, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations
) -> None:
    _check_post_pre(op, f, x, post, comb, fn, scale, base, norm_eps, hc_eps, iterations)
    _check_norm_weight(op, x, norm_weight)


def _check_head(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, hc_eps: float) -> None:
    _check_streams("hc_head", x)
    _check_mix("hc_head", x, fn, scale, base, x.shape[-2], 1)


def alloc_pre(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    *rows, n, d = x.shape
    post, comb = (x.new_empty(shape, dtype=torch.float32) for shape in ((*rows, n), (*rows, n, n)))
    return x.new_empty((*rows, d)), post, comb


def _alloc_post_pre(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *alloc_pre(x)


def mix_workspace(x: Tensor, outputs: int) -> Tensor:
    """What the kernels hand from the first launch to the second: partial sums of `outputs` products and of squares."""
    *rows, _, d = x.shape
    tokens, splits = prod(rows), -(-d // SPLIT_COLUMNS)
    chunks = splits if tokens < MANY_TOKENS else -(-splits // SPLITS_PER_GROUP)
    return x.new_empty((tokens * chunks * (outputs + 4),), dtype=torch.float32)


def sinkhorn_reference(logits: Tensor, eps: float, iterations: int) -> Tensor:
    """Softmax over the rows, a column normalisation, then iterations - 1 times rows and columns."""
    eps = logits.new_full((), eps)  # as a Python number it would be converted in every one of the additions
    comb = logits.softmax(-1) + eps
    comb.div_(comb.sum(-2, keepdim=True).add_(eps))  # in place: on a CPU the allocations take as long as the sums
    for _ in range(iterations - 1):
        comb.div_(comb.sum(-1, keepdim=True).add_(eps))
        comb.div_(comb.sum(-2, keepdim=True).add_(eps))
    return comb.contiguous()


def _mix(x: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    flat = x.float().flatten(-2)
    return torch.nn.functional.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)


def _weighted_sum(weights: Tensor, x: Tensor) -> Tensor:
    """sum_j weights[..., j] * x[..., j, :] in fp32, in the order of j."""
    return sum(weights[..., j, None] * x[..., j, :].float() for j in range(x.shape[-2]))


def hc_pre_reference(x, fn, scale, base, norm_eps, hc_eps, iterations):
    """Collapse the streams into the input of a sub-layer, and compute how its output is mixed back."""
    n = x.shape[-2]
    pre, post, comb = _mix(x, fn, norm_eps).split((n, n, n * n), dim=-1)
    pre_base, post_base, comb_base = base.split((n, n, n * n))
    pre = torch.sigmoid(pre * scale[0] + pre_base) + hc_eps
    post = 2 * torch.sigmoid(post * scale[1] + post_base)
    # The op, not its reference: opened up, 2 * iterations dependent little sums are minutes of compile time.
    comb = sinkhorn((comb * scale[2] + comb_base).unflatten(-1, (n, n)), hc_eps, iterations)
    return _weighted_sum(pre, x).to(x.dtype), post.contiguous(), comb


def hc_post_reference(f: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """x'_k = post_k f + sum_j comb_jk x_j: the sum runs over the first index of comb."""
    f = f.float()
    mixed = [_weighted_sum(comb[..., k], x) for k in range(x.shape[-2])]
    return torch.stack([post[..., k, None] * f + mixed[k] for k in range(x.shape[-2])], dim=-2).to(x.dtype)


def hc_post_pre_reference(f, x, post, comb, fn, scale, base, norm_eps, hc_eps, iterations):
    """hc_post, then the hc_pre of the next sub-layer."""
    streams = hc_post_reference(f, x, post, comb)
    return streams, *hc_pre_reference(streams, fn, scale, base, norm_eps, hc_eps, iterations)


def hc_pre_rms_norm_reference(x, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations):
    """hc_pre, then rms_norm of the sub-layer's input."""
    y, post, comb = hc_pre_reference(x, fn, scale, base, norm_eps, hc_eps, iterations)
    return rms_norm_reference(y, norm_weight, norm_eps), post, comb


def hc_post_pre_rms_norm_reference(f, x, post, comb, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations):
    """hc_post, then the hc_pre and rms_norm of the next sub-layer."""
    streams = hc_post_reference(f, x, post, comb)
    return streams, *hc_pre_rms_norm_reference(streams, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations)


def hc_head_reference(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, hc_eps: float) -> Tensor:
    """Collapse the streams for the output head: only `pre`, from weights fn [n, n * d], scale [1] and base [n]."""
    return _weighted_sum(torch.sigmoid(_mix(x, fn, norm_eps) * scale + base) + hc_eps, x).to(x.dtype)


# logits [..., n, n] f32
sinkhorn = define(
    "sinkhorn(Tensor logits, float eps, int iterations) -> (Tensor comb)",
    alloc=lambda logits, eps, iterations: logits.new_empty(logits.shape),
    reference=sinkhorn_reference,
    check=_check_sinkhorn,
)
# -> y [..., d] in the dtype of x, post f32 [..., n], comb f32 [..., n, n]
hc_pre = define(
    "hc_pre(Tensor x, Tensor fn, Tensor scale, Tensor base, float norm_eps, float hc_eps, int iterations)"
    " -> (Tensor y, Tensor post, Tensor comb)",
    alloc=lambda x, fn, scale, base, norm_eps, hc_eps, iterations: alloc_pre(x),
    reference=hc_pre_reference,
    check=partial(_check_pre, "hc_pre"),
    workspace=lambda x, fn, *rest: mix_workspace(x, len(fn)),
    inline=Inline.ALWAYS,
)
# -> y [..., n, d] in the dtype of x: the streams after a sub-layer
hc_post = define(
    "hc_post(Tensor f, Tensor x, Tensor post, Tensor comb) -> (Tensor y)",
    alloc=lambda f, x, post, comb: x.new_empty(x.shape),
    reference=hc_post_reference,
    check=partial(_check_post, "hc_post"),
    inline=Inline.ALWAYS,
)
# hc_post of one sub-layer, then hc_pre of the next (its weights are fn, scale, base)
hc_post_pre = define(
    "hc_post_pre(Tensor f, Tensor x, Tensor post, Tensor comb, Tensor fn, Tensor scale, Tensor base, float norm_eps,"
    " float hc_eps, int iterations) -> (Tensor streams, Tensor y, Tensor post_next, Tensor comb_next)",
    alloc=lambda f, x, post, comb, fn, scale, base, norm_eps, hc_eps, iterations: _alloc_post_pre(x),
    reference=hc_post_pre_reference,
    check=partial(_check_post_pre, "hc_post_pre"),
    workspace=lambda f, x, post, comb, fn, *rest: mix_workspace(x, len(fn)),
    inline=Inline.ALWAYS,
)
# hc_pre, then the RMSNorm of the sub-layer: norm_weight [d] bf16|f32; y is the normed row
hc_pre_rms_norm = define(
    "hc_pre_rms_norm(Tensor x, Tensor fn, Tensor scale, Tensor base, Tensor norm_weight, float norm_eps, float hc_eps,"
    " int iterations) -> (Tensor y, Tensor post, Tensor comb)",
    alloc=lambda x, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations: alloc_pre(x),
    reference=hc_pre_rms_norm_reference,
    check=partial(check_pre_rms_norm, "hc_pre_rms_norm"),
    workspace=lambda x, fn, *rest: mix_workspace(x, len(fn)),
    inline=Inline.ALWAYS,
)
# hc_post, then hc_pre_rms_norm
hc_post_pre_rms_norm = define(
    "hc_post_pre_rms_norm(Tensor f, Tensor x, Tensor post, Tensor comb, Tensor fn, Tensor scale, Tensor base,"
    " Tensor norm_weight, float norm_eps, float hc_eps, int iterations)"
    " -> (Tensor streams, Tensor y, Tensor post_next, Tensor comb_next)",
    alloc=lambda f, x, post, comb, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations: _alloc_post_pre(x),
    reference=hc_post_pre_rms_norm_reference,
    check=partial(check_post_pre_rms_norm, "hc_post_pre_rms_norm"),
    workspace=lambda f, x, post, comb, fn, *rest: mix_workspace(x, len(fn)),
    inline=Inline.ALWAYS,
)
# fn f32 [n, n * d], scale f32 [1], base f32 [n] -> y [..., d] in the dtype of x
hc_head = define(
    "hc_head(Tensor x, Tensor fn, Tensor scale, Tensor base, float norm_eps, float hc_eps) -> (Tensor y)",
    alloc=lambda x, fn, scale, base, norm_eps, hc_eps: x.new_empty((*x.shape[:-2], x.shape[-1])),
    reference=hc_head_reference,
    check=_check_head,
    workspace=lambda x, fn, *rest: mix_workspace(x, len(fn)),
    inline=Inline.ALWAYS,
)
