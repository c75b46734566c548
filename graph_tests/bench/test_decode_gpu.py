"""The model that benchmarks/decode_gpu.py times, at tiny widths on a CPU, and how it reads a profile."""

from dataclasses import dataclass, field

import pytest
import torch

from benchmarks.decode_gpu import kernels_outside_blocks, measure, table
from benchmarks.kernel_trace import OUTSIDE, family, shares_of_families, shares_of_operators, trace
from benchmarks.random_model import LAYERS, random_model, rewind, seat
from benchmarks.shapes import PRO
from dsv4_ops.ops.pages import read_kv
from graph_tests.bench.tiny_widths import TINY
from model.linear import Fp8Linear
from model.state import WINDOW_PAGE_SIZE

BATCH, CONTEXT, STEPS = 3, 300, 8


@pytest.fixture(scope="module")
def model():
    return random_model(TINY, "cpu")


def test_random_weights_are_numbers_in_the_official_format(model):
    for name, parameter in model.named_parameters():
        assert not parameter.is_floating_point() or parameter.float().isfinite().all(), name
    assert isinstance(model.blocks[0].attn.wo_b, Fp8Linear)
    assert model.blocks[1].ffn.experts.format == "mxfp4"
    assert [block.attn.kind for block in model.blocks] == [kind for kind, _ in LAYERS]


def test_products_keep_the_size_of_their_input(model):
    """Otherwise activations would grow or vanish from layer to layer, and quantisers see only zeros."""
    layer = model.blocks[0].attn.wqkv_a
    x = torch.randn(64, TINY.hidden_size).to(torch.float8_e4m3fn)
    scale = torch.full((64, TINY.hidden_size // 128), 127, dtype=torch.uint8)
    assert 0.3 < float(layer(x, scale).float().std()) < 3


def test_token_tables_name_different_experts(model):
    chosen = model.hash_experts.sort(-1).values
    assert (chosen[..., 1:] > chosen[..., :-1]).all() and int(chosen.max()) < TINY.n_routed_experts


def test_seated_state_holds_entries_that_are_not_zero(model):
    seat(model, BATCH, CONTEXT, STEPS)
    layer, dims = model.state.layers[1], (TINY.head_dim, TINY.rope_dim)
    entries = torch.arange(64).expand(BATCH, -1)
    for pool, page_table in ((layer.window_pool, layer.window_table), (layer.compressed_pool, layer.compressed_table)):
        keys = read_kv(pool, page_table, entries, WINDOW_PAGE_SIZE, *dims)
        assert keys.isfinite().all() and 0.3 < float(keys.std()) < 3
    assert layer.compressor_state.std() > 0.5 and layer.index_pool.float().std() > 1


def test_random_model_decodes(model):
    seat(model, BATCH, CONTEXT, STEPS)
    for step in range(STEPS):
        tokens = model.decode_step()
        assert tokens.shape == (BATCH,) and ((tokens >= 0) & (tokens < TINY.vocab_size)).all(), step
    assert (model.state.position == CONTEXT + STEPS).all() and model.state.active.all()
    rewind(model, CONTEXT)
    assert (model.state.position == CONTEXT).all()


def test_logits_of_the_random_model_are_finite_and_differ(model):
    seat(model, BATCH, CONTEXT, STEPS)
    positions = model.state.position[:, None].clone()
    logits = model.logits(model(model.state.token[:, None], positions))
    assert logits.isfinite().all() and float(logits.std()) > 0.1


def test_trace_finds_the_operators_of_a_step(model):
    seat(model, BATCH, CONTEXT, STEPS)
    events, kernels = trace(model.decode_step, 1)
    names = {event.name for event in events}
    assert {"dsv4::linear_fp8", "dsv4::moe_mxfp4", "dsv4::sparse_attention_selected", "dsv4::sample"} <= names
    assert torch.cuda.is_available() or kernels == []


def test_ranges_around_blocks_are_taken_off_again(model):
    seat(model, BATCH, CONTEXT, STEPS)
    assert kernels_outside_blocks(model, model.decode_step) >= 0
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in model.blocks)


@dataclass
class Launch:
    name: str
    duration: float


@dataclass
class Event:
    name: str
    kernels: list = field(default_factory=list)
    cpu_children: list = field(default_factory=list)
    cpu_parent: "Event | None" = None

    def over(self, *children: "Event") -> "Event":
        for child in children:
            self.cpu_children.append(child)
            child.cpu_parent = self
        return self

    def flat(self) -> list:
        return [self, *(event for child in self.cpu_children for event in child.flat())]


def test_nested_operators_count_once():
    """hc_pre calls sinkhorn, and a functional operator its `.out`: the time is the outer one's."""
    inner = Event("dsv4::sinkhorn", [Launch("k", 2.0)])
    out = Event("dsv4::hc_pre", [Launch("k", 5.0)]).over(inner)
    root = Event("step", [Launch("torch", 1.0)]).over(Event("dsv4::hc_pre").over(out), Event("aten::add"))
    shares = shares_of_operators(root.flat())
    assert {name: (share.us, share.kernels) for name, share in shares.items()} == {
        "hc_pre": (7.0, 2),
        OUTSIDE: (1.0, 1),
    }


def test_shares_are_those_of_one_step():
    kernels = [("triton_poi_fused_0", 3.0), ("Memcpy DtoD (Device -> Device)", 1.0)] * 4
    shares = shares_of_families(kernels, steps=4)
    assert [(name, share.us, share.kernels) for name, share in shares.items()] == [
        ("Inductor", 3.0, 1),
        ("copies", 1.0, 1),
    ]
    assert table(shares)["Inductor"] == {"us": 3.0, "kernels": 1, "share": 0.75}


@pytest.mark.parametrize(
    "kernel, name",
    [
        ("void dsv4::(anonymous namespace)::quant_fp8_kernel<128, false, __nv_bfloat16>(T3 const*)", "quant_fp8"),
        ("void dsv4::hc_post_kernel<4>(float*)", "hc_post"),
        ("triton_red_fused_mul_sum_3", "Inductor"),
        ("nvjet_hsh_64x8_64x16_4x1_v_bz_TNT", "library products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>(Params)", "library products"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>(int)", "torch"),
        ("Memset (Device)", "copies"),
        ("ncclDevKernel_AllReduce", "other"),
    ],
)
def test_family_of_a_kernel(kernel, name):
    assert family(kernel) == name


@pytest.mark.cuda
def test_measured_step_of_a_tiny_model_on_a_gpu():
    model = random_model(TINY, "cuda")
    seat(model, 1, CONTEXT, STEPS)
    model.decode_step()
    run = measure(model, 2, CONTEXT, STEPS, kernels_outside_blocks(model, model.decode_step))
    assert run["step_us"] > 0 and run["kernels_a_step"] > run["kernels_a_layer"] > 0
    assert sum(share["share"] for share in run["operators"].values()) == pytest.approx(1, abs=1e-2)


def test_widths_of_pro_make_a_config():
    """The builder is not tied to Flash; the config checks its own relations."""
    from benchmarks.random_model import config_of

    assert config_of(PRO).n_routed_experts == 384
