"""Hyper-connections fused with the norm and the quantiser of the sub-layer that they feed.

Each reference is the literal composition: hc_pre_rms_norm or hc_post_pre_rms_norm, then the quantiser of its rounded y.
y is an output as well, because the router and the compressors read it. NVFP4 uses one global scale for each row.

Shapes: those of hyper_connection.py and fused_quant.py; T stands for the leading dimensions of x [T, n, d].
"""

import torch

from dsv4_ops.ops.fused_quant import alloc_nvfp4
from dsv4_ops.ops.hyper_connection import (
    alloc_pre,
    check_post_pre_rms_norm,
    check_pre_rms_norm,
    hc_post_pre_rms_norm_reference,
    hc_pre_rms_norm_reference,
    mix_workspace,
)
from dsv4_ops.ops.nvfp4 import NVFP4_GROUP, nvfp4_row_scale_reference, quant_nvfp4_reference
from dsv4_ops.ops.quant import alloc_fp8, expect_fp8_groups, expect_groups, quant_fp8_reference
from dsv4_ops.registry import Inline, define


def hc_pre_rms_norm_quant_fp8_reference(x, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations, group):
    """hc_pre_rms_norm, then quant_fp8."""
    y, post, comb = hc_pre_rms_norm_reference(x, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations)
    return y, post, comb, *quant_fp8_reference(y, group)


def hc_pre_rms_norm_quant_nvfp4_reference(x, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations):
    """hc_pre_rms_norm, nvfp4_row_scale, then quant_nvfp4."""
    y, post, comb = hc_pre_rms_norm_reference(x, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations)
    global_scale = nvfp4_row_scale_reference(y)
    return y, post, comb, *quant_nvfp4_reference(y, global_scale), global_scale


def hc_post_pre_rms_norm_quant_fp8_reference(
    f, x, post, comb, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations, group
):
    """hc_post_pre_rms_norm, then quant_fp8."""
    results = hc_post_pre_rms_norm_reference(
        f, x, post, comb, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations
    )
    return *results, *quant_fp8_reference(results[1], group)


def hc_post_pre_rms_norm_quant_nvfp4_reference(
    f, x, post, comb, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations
):
    """hc_post_pre_rms_norm, nvfp4_row_scale, then quant_nvfp4."""
    results = hc_post_pre_rms_norm_reference(
        f, x, post, comb, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations
    )
    global_scale = nvfp4_row_scale_reference(results[1])
    return *results, *quant_nvfp4_reference(results[1], global_scale), global_scale


def _check_pre_fp8(x, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations, group) -> None:
    op = "hc_pre_rms_norm_quant_fp8"
    check_pre_rms_norm(op, x, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations)
    expect_fp8_groups(op, x, group)


def _check_pre_nvfp4(x, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations) -> None:
    op = "hc_pre_rms_norm_quant_nvfp4"
    check_pre_rms_norm(op, x, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations)
    expect_groups(op, x, NVFP4_GROUP)


def _check_post_pre_fp8(f, x, post, comb, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations, group) -> None:
    op = "hc_post_pre_rms_norm_quant_fp8"
    check_post_pre_rms_norm(op, f, x, post, comb, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations)
    expect_fp8_groups(op, x, group)


def _check_post_pre_nvfp4(f, x, post, comb, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations) -> None:
    op = "hc_post_pre_rms_norm_quant_nvfp4"
    check_post_pre_rms_norm(op, f, x, post, comb, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations)
    expect_groups(op, x, NVFP4_GROUP)


def _alloc_pre_fp8(x, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations, group):
    y, post, comb = alloc_pre(x)
    return y, post, comb, *alloc_fp8(y, group, torch.uint8)


def _alloc_pre_nvfp4(x, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations):
    y, post, comb = alloc_pre(x)
    return y, post, comb, *alloc_nvfp4(y)


def _alloc_post_pre_fp8(f, x, post, comb, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations, group):
    return x.new_empty(x.shape), *_alloc_pre_fp8(x, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations, group)


def _alloc_post_pre_nvfp4(f, x, post, comb, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations):
    return x.new_empty(x.shape), *_alloc_pre_nvfp4(x, fn, scale, base, norm_weight, norm_eps, hc_eps, iterations)


# x [T, n, d] bf16 | f32, norm_weight [d] bf16 | f32; group 32 | 64 | 128 -> y [T, d] of x's dtype (normed),
# post f32 [T, n], comb f32 [T, n, n], q [T, d] E4M3, q_scale [T, d/group] uint8 (UE8M0)
hc_pre_rms_norm_quant_fp8 = define(
    "hc_pre_rms_norm_quant_fp8(Tensor x, Tensor fn, Tensor scale, Tensor base, Tensor norm_weight, float norm_eps,"
    " float hc_eps, int iterations, int group) -> (Tensor y, Tensor post, Tensor comb, Tensor q, Tensor q_scale)",
    alloc=_alloc_pre_fp8,
    reference=hc_pre_rms_norm_quant_fp8_reference,
    check=_check_pre_fp8,
    inline=Inline.ALWAYS,
    workspace=lambda x, fn, *rest: mix_workspace(x, len(fn)),
)
# the same with q [T, d/2] uint8, q_scale [T, d/16] E4M3, global_scale [T, 1] f32
hc_pre_rms_norm_quant_nvfp4 = define(
    "hc_pre_rms_norm_quant_nvfp4(Tensor x, Tensor fn, Tensor scale, Tensor base, Tensor norm_weight, float norm_eps,"
    " float hc_eps, int iterations)"
    " -> (Tensor y, Tensor post, Tensor comb, Tensor q, Tensor q_scale, Tensor global_scale)",
    alloc=_alloc_pre_nvfp4,
    reference=hc_pre_rms_norm_quant_nvfp4_reference,
    check=_check_pre_nvfp4,
    inline=Inline.ALWAYS,
    workspace=lambda x, fn, *rest: mix_workspace(x, len(fn)),
)
# hc_post of one sub-layer, then hc_pre_rms_norm_quant_fp8 of the next: streams [T, n, d] of x's dtype in front
hc_post_pre_rms_norm_quant_fp8 = define(
    "hc_post_pre_rms_norm_quant_fp8(Tensor f, Tensor x, Tensor post, Tensor comb, Tensor fn, Tensor scale, Tensor base,"
    " Tensor norm_weight, float norm_eps, float hc_eps, int iterations, int group)"
    " -> (Tensor streams, Tensor y, Tensor post_next, Tensor comb_next, Tensor q, Tensor q_scale)",
    alloc=_alloc_post_pre_fp8,
    reference=hc_post_pre_rms_norm_quant_fp8_reference,
    check=_check_post_pre_fp8,
    inline=Inline.ALWAYS,
    workspace=lambda f, x, post, comb, fn, *rest: mix_workspace(x, len(fn)),
)
# hc_post of one sub-layer, then hc_pre_rms_norm_quant_nvfp4 of the next
hc_post_pre_rms_norm_quant_nvfp4 = define(
    "hc_post_pre_rms_norm_quant_nvfp4(Tensor f, Tensor x, Tensor post, Tensor comb, Tensor fn, Tensor scale,"
    " Tensor base, Tensor norm_weight, float norm_eps, float hc_eps, int iterations) -> (Tensor streams, Tensor y,"
    " Tensor post_next, Tensor comb_next, Tensor q, Tensor q_scale, Tensor global_scale)",
    alloc=_alloc_post_pre_nvfp4,
    reference=hc_post_pre_rms_norm_quant_nvfp4_reference,
    check=_check_post_pre_nvfp4,
    inline=Inline.ALWAYS,
    workspace=lambda f, x, post, comb, fn, *rest: mix_workspace(x, len(fn)),
)
