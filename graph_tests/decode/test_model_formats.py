"""The model in every storage format: what is loaded is what is stored, and quantised modes quantise."""

import pytest
import torch
from transformers import DeepseekV4ForCausalLM

from graph_tests.decode.stored_formats import CONFIG, FORMATS, QUANTISED, dequantised, stored, write, write_formats
from model import load
from model.linear import DenseGroupedLinear, W8a16GroupedLinear
from model.logits import compute_logits
from model.storage import Storage
from model.weight_formats import E8M0, F32, FP8, WeightFormats

BATCH, LENGTH, PROMPT = 2, 40, 36
# Relative L2 distance of the logits from fp32, in default mode. Measured: 0.14, 0.18, 0.23, 0.27, 0.37; most of it is
# experts and entries that are chosen differently, since random weights leave all of them equally likely.
LARGEST_DISTANCE = dict(zip(FORMATS, (0.2, 0.27, 0.34, 0.4, 0.55), strict=True))


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return write_formats(tmp_path_factory.mktemp("formats"))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(CONFIG["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(13))


@pytest.fixture(scope="module")
def twins(directories):
    """(format, dtype) -> directory of the dequantised model, written when it is asked for."""

    def twin(name, dtype):
        directory = directories[name].with_name(f"{directories[name].name}-{dtype}")
        return directory if directory.exists() else write(directory, dequantised(stored(directories[name]), dtype))

    return twin


def make(directory, **options):
    return load(directory, max_batch=BATCH, max_seq_len=64, **options)


def logits_of(model, tokens):
    """Logits of a prompt and of decode steps after it, then those of the draft block on the whole sequence."""
    logits = compute_logits(model, tokens, PROMPT)
    positions = torch.arange(LENGTH, dtype=torch.int32).expand(BATCH, -1).contiguous()
    with torch.no_grad():
        draft = model.draft_logits(model(tokens, positions), tokens.roll(-1, 1), positions)
    return logits, draft


def distance(logits, reference):
    return float((logits - reference).norm() / reference.norm())


@pytest.mark.parametrize("name", QUANTISED)
def test_weights_without_activation_quantisation_equal_the_bf16_twin(directories, twins, tokens, name):
    """Bit for bit. FP8 and MXFP4 values are exact in bf16; the others are rounded once, from the same fp32 values."""
    got = logits_of(make(directories[name], quantise_activations=False), tokens)
    twin = logits_of(make(twins(name, torch.bfloat16)), tokens)
    assert all(torch.equal(a, b) for a, b in zip(got, twin, strict=True))


@pytest.mark.parametrize("name", FORMATS)
def test_exact_mode_equals_the_fp32_twin(directories, twins, tokens, name):
    """Bit for bit: every stored value is an fp32 number."""
    got = logits_of(make(directories[name], exact=True), tokens)
    twin = logits_of(make(twins(name, torch.float32), exact=True), tokens)
    assert all(torch.equal(a, b) for a, b in zip(got, twin, strict=True))


@pytest.mark.parametrize("name", FORMATS)
def test_exact_mode_equals_transformers_on_the_fp32_twin(directories, twins, tokens, name):
    directory = twins(name, torch.float32)
    judge = DeepseekV4ForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        reference = judge(tokens, use_cache=False).logits
    # fp32 on both sides, sums in another order: measured 9e-7
    assert distance(compute_logits(make(directories[name], exact=True), tokens, PROMPT), reference) < 1e-5


@pytest.mark.parametrize("name", FORMATS)
def test_default_mode_is_near_exact_mode_but_quantises(directories, tokens, name):
    exact = logits_of(make(directories[name], exact=True), tokens)
    for got, reference in zip(logits_of(make(directories[name]), tokens), exact, strict=True):
        # bf16 alone moves these logits by more than 1 %, so less would mean that nothing was rounded
        assert 0.01 < distance(got, reference) < LARGEST_DISTANCE[name]


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_layers_quantise_their_activations(directories, tokens, name):
    plain = logits_of(make(directories[name], quantise_activations=False), tokens)
    for got, other in zip(logits_of(make(directories[name]), tokens), plain, strict=True):
        assert not torch.equal(got, other)


def test_bf16_weights_have_no_activations_to_quantise(directories, tokens):
    plain = logits_of(make(directories["bf16"], quantise_activations=False), tokens)
    got = logits_of(make(directories["bf16"]), tokens)
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_index_keys_in_fp8_select_more_like_exact_mode_than_fp4(directories, tokens):
    """Everything else is the same; the pools differ in size: 64 entries of 64 + 4 bytes against 32 + 2."""
    exact = compute_logits(make(directories["bf16"], exact=True), tokens, PROMPT)
    fp4, fp8 = make(directories["bf16"]), make(directories["bf16"], index_fp8=True)
    far, near = (distance(compute_logits(model, tokens, PROMPT), exact) for model in (fp4, fp8))
    assert 0.01 < near < far
    assert fp4.state.layers[1].index_pool.shape[1] == 64 * (32 + 2)
    assert fp8.state.layers[1].index_pool.shape[1] == 64 * (64 + 4)


@pytest.mark.parametrize(
    "device, scale, kind",
    (("meta", E8M0, W8a16GroupedLinear), ("meta", F32, DenseGroupedLinear), ("cpu", E8M0, DenseGroupedLinear)),
)
def test_a_gpu_reads_output_projections_as_they_are_stored(device, scale, kind):
    """Where conversion to bf16 is exact; its activations stay bf16 and need no whole blocks."""
    storage = Storage(WeightFormats(linear=FP8, fp8_scale=scale), torch.device(device))
    wo_a = storage.grouped_linear("layers.0.attn.wo_a", 2, 72, 192)
    assert type(wo_a) is kind and wo_a.activation == "dense"
    assert [key for binding in wo_a.bindings() for key in binding.keys] == [
        "layers.0.attn.wo_a.weight",
        "layers.0.attn.wo_a.scale",
    ]


@torch.no_grad()
def test_output_projections_as_they_are_stored_have_the_bits_of_dequantised_ones(directories):
    """What a GPU loads, on the CPU."""
    model, tensors = make(directories["official"]), stored(directories["official"])
    dequantised_form = model.blocks[1].attn.wo_a
    rows, columns = dequantised_form.weight.shape
    stored_form = W8a16GroupedLinear({"layers.1.attn.wo_a": rows}, columns, model.storage)
    for binding in stored_form.bindings():
        binding.target.copy_(binding.convert(tensors[binding.keys[0]]))
    assert 2 * stored_form.weight.nbytes == dequantised_form.weight.nbytes
    x = torch.randn(5, 2, columns, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert torch.equal(stored_form(x), dequantised_form(x))


@pytest.mark.parametrize("name", FORMATS)
def test_pools_are_packed_in_default_mode_and_plain_in_exact_mode(directories, name):
    """A packed KV page of 64 entries of head dimension 128 = 64 + 64: 64 x (64 + 2 * 64 + 8) bytes, in 576s."""
    for exact, dtype, size in ((False, torch.uint8, 64 * 200 + 448), (True, torch.float32, 64 * 128)):
        for layer in make(directories[name], exact=exact).state.layers:
            assert layer.window_pool.dtype == dtype and layer.window_pool.shape[1] == size


@pytest.mark.parametrize(
    "name, linear, experts",
    (
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("official", torch.float8_e4m3fn, torch.uint8),
        ("fp8 with fp32 scales", torch.float8_e4m3fn, torch.float8_e4m3fn),
        ("nvfp4-experts", torch.float8_e4m3fn, torch.uint8),
        ("nvfp4", torch.uint8, torch.uint8),
    ),
)
def test_default_mode_keeps_weights_as_they_are_stored(directories, name, linear, experts):
    block = make(directories[name]).blocks[1]
    joined = (*block.attn.wqkv_a.products, *block.ffn.shared.w13.products)
    alone = (block.attn.wq_b, block.attn.indexer.wq_b, block.attn.wo_b, block.ffn.shared.w2)
    assert {product.weight.dtype for product in (*joined, *alone)} == {linear}
    assert block.ffn.experts.w1.dtype == experts
    assert block.attn.wo_a.weight.dtype == (torch.uint8 if name == "nvfp4" else torch.bfloat16)
