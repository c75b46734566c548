"""Fusions around hyper-connections: the largest fused op where there is one, no bit changed, and what stays alone."""

import pytest
import torch

from dsv4_ops import ops
from graph_tests import checks
from graph_tests.graphs.rewritten import FusedThenEager


def fused_ops(function, *arguments) -> dict[str, int]:
    """What the passes made of `function`, whose results have to keep their bits."""
    torch._dynamo.reset()
    backend = FusedThenEager()
    for actual, expected in zip(
        torch.compile(function, backend=backend)(*arguments), function(*arguments), strict=True
    ):
        checks.assert_bits_equal(actual, expected)
    return dict(backend.matches)


def hyper_connection(dtype: torch.dtype = torch.bfloat16, streams: int = 4, dim: int = 128):
    """x, the weights of hc_pre, its scalars, and a norm's weight."""
    rows = (2 + streams) * streams
    weights = torch.randn(rows, streams * dim) * 0.05, torch.tensor([0.7, 1.3, 2.0]), torch.randn(rows)
    return torch.randn(5, streams, dim).to(dtype), weights, (1e-6, 1e-5, 20), torch.randn(dim).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("form", ["", "_quant_fp8", "_quant_nvfp4"])
def test_streams_are_fused_with_what_reads_them_bit_for_bit(form):
    """Two sub-layers; every result is returned, so each has to come out of the fused ops too."""
    x, weights, scalars, norm_weight = hyper_connection()

    def sub_layer(streams):
        y, post, comb = ops.hc_pre(streams, *weights, *scalars)
        y = ops.rms_norm(y, norm_weight, scalars[0])
        if form == "_quant_fp8":
            return y, post, comb, *ops.quant_fp8(y, 64)
        if form == "_quant_nvfp4":
            row_scale = ops.nvfp4_row_scale(y)
            return y, post, comb, *ops.quant_nvfp4(y, row_scale), row_scale
        return y, post, comb

    def function(x):
        first = sub_layer(x)
        streams = ops.hc_post(first[0], x, first[1], first[2])
        return *first, streams, *sub_layer(streams)

    expected = {"hc_pre_rms_norm": 2, "hc_post_pre_rms_norm": 1}
    if form:
        expected |= {f"hc_pre_rms_norm{form}": 1, f"hc_post_pre_rms_norm{form}": 1}
    assert fused_ops(function, x) == expected


@torch.no_grad()
def test_streams_without_a_norm_are_fused_with_the_next_mix():
    x, weights, scalars, _ = hyper_connection(torch.float32)

    def function(x):
        y, post, comb = ops.hc_pre(x, *weights, *scalars)
        streams = ops.hc_post(y, x, post, comb)
        return streams, *ops.hc_pre(streams, *weights, *scalars)

    assert fused_ops(function, x) == {"hc_post_pre": 1}


@torch.no_grad()
@pytest.mark.parametrize("reason", ["another eps", "y has another reader", "two norms", "a weight that comes later"])
def test_a_mix_that_a_fused_op_cannot_express_stays(reason):
    x, weights, scalars, norm_weight = hyper_connection()

    def function(x):
        y, post, comb = ops.hc_pre(x, *weights, *scalars)
        weight = norm_weight * post.sum() if reason == "a weight that comes later" else norm_weight
        normed = ops.rms_norm(y, weight, 1e-5 if reason == "another eps" else scalars[0])
        others = {"y has another reader": (y + 1,), "two norms": (ops.rms_norm(y, weight.float(), scalars[0]),)}
        return normed, post, comb, *others.get(reason, ())

    assert fused_ops(function, x) == {}


@torch.no_grad()
def test_a_mix_whose_weights_come_after_the_streams_is_not_moved_there():
    x, (fn, scale, base), scalars, _ = hyper_connection()
    f, post, comb = x[:, 0].contiguous(), torch.rand(5, 4), torch.rand(5, 4, 4)

    def function(x):
        streams = ops.hc_post(f, x, post, comb)
        return streams, *ops.hc_pre(streams, fn * streams[0, 0, 0].float(), scale, base, *scalars)

    assert fused_ops(function, x) == {}
