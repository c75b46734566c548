"""Fusion passes: what they make of each kind of block, and that they change no bit."""

from functools import partial

import pytest
import torch
from expecttest import assert_expected_inline

from dsv4_ops.backend import HOOK, dsv4
from dsv4_ops.passes import SOURCES, GraphPasses
from graph_tests import checks
from graph_tests.graphs.rewritten import FusedThenEager, aten_operators, operators
from graph_tests.ops.attention_cases import make as make_attention
from graph_tests.ops.attention_cases import sequence_arguments
from graph_tests.tiny import FORMATS, tiny_checkpoint
from model.loading import load

BATCH, STEPS = 3, 6
KIND_OF_LAYER = {"window": 0, "csa": 1, "hca": 2}


def matches(form: str) -> dict[str, int]:
    """How often each fused op is made in a block. Norm + quantise: inputs of attention and MoE, with the mix that the
    block itself calls fused; query latent. SwiGLU + quantise: shared expert."""
    made = {f"hc_post_pre_rms_norm{form}": 2, f"rms_norm{form}": 1, f"swiglu{form}": 1}
    return made if form else {}


MATCHES = {
    "bf16": matches(""),
    "official": matches("_quant_fp8"),
    "nvfp4-experts": matches("_quant_fp8"),
    "nvfp4": matches("_quant_nvfp4"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    return {weight_format: tiny_checkpoint(directory, weight_format, layers=3) for weight_format in FORMATS}


@torch.no_grad()
def decode(model, steps: int = STEPS) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Prefill ragged prompts, decode greedily; tokens [steps, B] and every buffer of the state afterwards."""
    state = model.state
    tokens = torch.arange(BATCH * 7).view(BATCH, 7) % model.config.vocab_size
    logits = model.prefill(tokens, torch.tensor([7, 4, 2]))
    state.active.fill_(True)
    model.sample_next(logits, state.active.clone())
    sampled = torch.stack([model.decode_step() for _ in range(steps)])
    return sampled, {name: buffer.clone() for name, buffer in state.named_buffers()}


def fresh(checkpoint):
    torch._dynamo.reset()
    return load(checkpoint, max_batch=BATCH, max_seq_len=32, max_chunk=8)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_fused_graph_equals_eager_bit_for_bit(checkpoints, weight_format):
    expected, expected_state = decode(fresh(checkpoints[weight_format]))
    model, backend = fresh(checkpoints[weight_format]), FusedThenEager()
    model.compile(backend=backend)
    tokens, state = decode(model)
    assert torch.equal(tokens, expected)
    for name, buffer in state.items():
        assert torch.equal(buffer, expected_state[name]), name


@pytest.mark.parametrize("weight_format", FORMATS)
@torch.no_grad()
def test_every_block_is_fused_as_often_as_it_can_be(checkpoints, weight_format):
    model, backend = fresh(checkpoints[weight_format]), FusedThenEager()
    model.compile(backend=backend)
    model.decode_step()
    assert len(backend.graphs) == 3
    assert backend.matches == {name: 3 * count for name, count in MATCHES[weight_format].items()}
    left = {name for graph in backend.graphs for name in operators(graph)}
    # Quantisers that stay alone read what attention and the grouped product return: there is nothing to fuse them with.
    assert left & {"rms_norm", "swiglu"} == ({"rms_norm", "swiglu"} if weight_format == "bf16" else set())
    assert not left & {"hc_pre", "hc_post"}  # also between blocks: a flow brings what is to be mixed


@torch.no_grad()
def decode_graph(checkpoint, layer: int):
    model, backend = fresh(checkpoint), FusedThenEager()
    model.compile(backend=backend)
    model.decode_step()
    return backend.graphs[layer]


def test_operators_of_a_window_block(checkpoints):
    graph = decode_graph(checkpoints["official"], KIND_OF_LAYER["window"])
    assert_expected_inline(
        "\n".join(operators(graph)),
        """\
hc_post_pre_rms_norm_quant_fp8
linear_fp8
rms_norm_quant_fp8
linear_fp8
qkv_norm_rope_append
sparse_attention_window
grouped_linear_dense
quant_fp8
linear_fp8
hc_post_pre_rms_norm_quant_fp8
gate
linear_fp8
swiglu_quant_fp8
linear_fp8
moe_mxfp4""",
    )


def test_operators_of_a_csa_block(checkpoints):
    graph = decode_graph(checkpoints["official"], KIND_OF_LAYER["csa"])
    assert_expected_inline(
        "\n".join(operators(graph)),
        """\
hc_post_pre_rms_norm_quant_fp8
linear_fp8
rms_norm_quant_fp8
linear_fp8
qkv_norm_rope_append
linear_fp32
csa_compress_append
index_compress_append_fp4
linear_fp8
index_query_fp4
index_topk_fp4
sparse_attention_selected
grouped_linear_dense
quant_fp8
linear_fp8
hc_post_pre_rms_norm_quant_fp8
gate
linear_fp8
swiglu_quant_fp8
linear_fp8
moe_mxfp4""",
    )


def test_operators_of_an_hca_block(checkpoints):
    graph = decode_graph(checkpoints["official"], KIND_OF_LAYER["hca"])
    assert_expected_inline(
        "\n".join(operators(graph)),
        """\
hc_post_pre_rms_norm_quant_fp8
linear_fp8
rms_norm_quant_fp8
linear_fp8
qkv_norm_rope_append
linear_fp32
hca_compress_append
sparse_attention_compressed
grouped_linear_dense
quant_fp8
linear_fp8
hc_post_pre_rms_norm_quant_fp8
gate
linear_fp8
swiglu_quant_fp8
linear_fp8
moe_mxfp4""",
    )


@pytest.mark.parametrize("kind", KIND_OF_LAYER)
def test_a_block_has_no_product_softmax_or_copy_outside_our_operators(checkpoints, kind):
    aten = aten_operators(decode_graph(checkpoints["official"], KIND_OF_LAYER[kind]))
    assert not set(aten) & {"mm", "bmm", "addmm", "_softmax", "sort", "topk", "index_put", "clone"}, aten


@torch.no_grad()
def test_mxfp4_pairs_are_fused_bit_for_bit():
    """No weight format of the model quantises activations to MXFP4; callers of the operators may."""
    ops = torch.ops.dsv4
    x, weight, ones = torch.randn(5, 128).bfloat16(), torch.randn(128).bfloat16(), torch.ones(5)

    def function(x):
        y = ops.rms_norm(x, weight, 1e-6)
        return y, *ops.quant_mxfp4(y), *ops.quant_mxfp4(ops.swiglu(x, ones, 10.0))

    torch._dynamo.reset()
    backend = FusedThenEager()
    for actual, expected in zip(torch.compile(function, backend=backend)(x), function(x), strict=True):
        checks.assert_bits_equal(actual, expected)
    assert backend.matches == {"rms_norm_quant_mxfp4": 1, "swiglu_quant_mxfp4": 1}


@torch.no_grad()
def test_an_activation_that_something_else_reads_is_not_fused_away():
    """swiglu_quant_fp8 does not return its activation, so swiglu stays where that has another user."""
    ops = torch.ops.dsv4
    x, ones = torch.randn(5, 256).bfloat16(), torch.ones(5)

    def function(x):
        h = ops.swiglu(x, ones, 10.0)
        return h + 1, *ops.quant_fp8(h, 128)

    torch._dynamo.reset()
    backend = FusedThenEager()
    for actual, expected in zip(torch.compile(function, backend=backend)(x), function(x), strict=True):
        checks.assert_bits_equal(actual, expected)
    assert not backend.matches


ATTENTION = ("window", "selected", "compressed")


def quantised_attention(kind: str, *arguments):
    """Attention, and the activations of an FP8 product of two groups of heads."""
    o, lse = getattr(torch.ops.dsv4, f"sparse_attention_{kind}")(*arguments)
    return *torch.ops.dsv4.quant_fp8(o.flatten(-2).unflatten(-1, (2, -1)), 128), lse


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_the_quantiser_of_an_output_becomes_part_of_attention(kind, dynamic):
    arguments, _ = make_attention(kind, [[20, 21], [3, -1], [60, 61]], dims=(128, 64), dtype=torch.bfloat16)
    torch._dynamo.reset()
    for place in sequence_arguments(kind) if dynamic else ():
        torch._dynamo.mark_dynamic(arguments[place], 0)
    backend = FusedThenEager()
    compiled = torch.compile(partial(quantised_attention, kind), backend=backend)
    for actual, expected in zip(compiled(*arguments), quantised_attention(kind, *arguments), strict=True):
        checks.assert_bits_equal(actual, expected)
    assert backend.matches == {f"sparse_attention_{kind}_quant_fp8": 1}
    assert operators(backend.graphs[0]) == [f"sparse_attention_{kind}_quant_fp8"]


@pytest.mark.parametrize("also", ["another_reader", "other_groups", "half_a_group"])
@torch.no_grad()
def test_the_quantiser_of_an_output_stays(also):
    """Where something else reads the output, or groups are not those of the fused op or go across heads."""
    dims = (192, 64) if also == "half_a_group" else (128, 64)
    arguments, _ = make_attention("window", [[20, 21]], dims=dims, dtype=torch.bfloat16)

    def function(*arguments):
        o, lse = torch.ops.dsv4.sparse_attention_window(*arguments)
        quantised = torch.ops.dsv4.quant_fp8(o.flatten(-2), 64 if also == "other_groups" else 128)
        return (*quantised, lse, o + 1) if also == "another_reader" else (*quantised, lse)

    torch._dynamo.reset()
    backend = FusedThenEager()
    for actual, expected in zip(
        torch.compile(function, backend=backend)(*arguments), function(*arguments), strict=True
    ):
        checks.assert_bits_equal(actual, expected)
    assert not backend.matches


@torch.no_grad()
def test_inductor_keeps_the_roundings_inside_a_fused_kernel():
    """Without emulate_precision_casts the quantiser reads the unrounded activation and some codes differ."""
    x, ones = torch.randn(64, 512).bfloat16() * 4, torch.ones(64)

    def function(x):
        return torch.ops.dsv4.swiglu_quant_fp8(x, ones, 10.0, 128)

    torch._dynamo.reset()
    for actual, expected in zip(torch.compile(function, backend="dsv4")(x), function(x), strict=True):
        checks.assert_bits_equal(actual, expected)


def test_the_uuid_covers_the_sources_of_passes_and_references():
    names = {path.rsplit("/", 1)[1] for path in SOURCES}
    assert {"fuse.py", "inline.py", "registry.py", "norm.py", "quant.py", "fused_quant.py"} <= names
    assert GraphPasses().uuid() == GraphPasses().uuid() is not None


def test_a_pass_of_the_user_for_our_hook_is_refused():
    with pytest.raises(ValueError, match=HOOK):
        dsv4(None, [], options={HOOK: lambda graph: None})
