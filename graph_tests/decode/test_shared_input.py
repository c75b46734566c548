"""Linears that share an input: one product where their format can join rows, which are the checkpoint's tensors."""

import pytest
import torch
from torch import Tensor

from graph_tests.decode.stored_formats import CONFIG, FORMATS, stored, write_formats
from model import load, refit
from model.config import ModelConfig
from model.linear import quantise
from model.storage import Storage
from model.weight_formats import FP8, WeightFormats

CSA, HCA = 1, 2  # layers of CONFIG
JOINED = {
    "attn.wqkv_a": ("attn.wq_a", "attn.wkv"),
    "ffn.shared.w13": ("ffn.shared_experts.w1", "ffn.shared_experts.w3"),
}
COMPRESSED = (
    "compressor.wkv", "compressor.wgate", "indexer.compressor.wkv", "indexer.compressor.wgate", "indexer.weights_proj",
)  # fmt: skip


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return write_formats(tmp_path_factory.mktemp("shared_input"))


def make(directory):
    return load(directory, max_batch=1, max_seq_len=64)


def raw(tensors) -> Tensor:
    return torch.cat([tensor.contiguous().view(torch.uint8).flatten() for tensor in tensors])


def assert_rows_are_the_tensors(model, tensors):
    """Bit for bit, weight and scales: nothing is lost on the way in, so reading the rows gives the checkpoint back."""
    for joined, names in JOINED.items():
        (product,) = model.blocks[CSA].get_submodule(joined).products
        for own, part in (("weight", "weight"), ("weight_scale", "scale")):
            given = [tensors[f"layers.{CSA}.{name}.{part}"] for name in names]
            assert torch.equal(raw([getattr(product, own)]), raw(given)), (joined, part)


def test_rows_of_a_joined_weight_are_the_tensors_of_the_checkpoint(directories):
    assert_rows_are_the_tensors(make(directories["official"]), stored(directories["official"]))


def test_refit_writes_the_rows_of_joined_weights(directories):
    model, tensors = make(directories["official"]), stored(directories["official"])
    new = tensors.copy()
    for name in (name for names in JOINED.values() for name in names):
        for part in ("weight", "scale"):
            old = tensors[f"layers.{CSA}.{name}.{part}"]
            new[f"layers.{CSA}.{name}.{part}"] = old.view(torch.uint8).flip(0).view(old.dtype)
    refit(model, new)
    assert_rows_are_the_tensors(model, new)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_join_what_they_can(directories, name):
    """NVFP4 weights have an fp32 scale each, which a product takes one of."""
    block = make(directories[name]).blocks[CSA]
    counts = {joined: len(block.get_submodule(joined).products) for joined in JOINED}
    assert counts == dict.fromkeys(JOINED, 2 if name == "nvfp4" else 1)


@pytest.mark.parametrize("name", FORMATS)
def test_all_that_is_projected_in_fp32_is_one_product(directories, name):
    """In the order in which `attend` takes the results."""
    model, tensors = make(directories[name]), stored(directories[name])
    for layer, count in ((CSA, 5), (HCA, 2)):
        given = [tensors[f"layers.{layer}.attn.{part}.weight"].float() for part in COMPRESSED[:count]]
        assert torch.equal(model.blocks[layer].attn.to_compress.weight, torch.cat(given))


@pytest.mark.parametrize("last", [4, 3])
def test_rows_of_an_fp32_product_start_at_multiples_of_16_bytes(last):
    """What a kernel loads whole; a part of any width may be the last."""
    linear = Storage(WeightFormats(), torch.device("cpu")).plain_linear({"a": 8, "b": last}, 16)
    targets = [binding.target for binding in linear.bindings()]
    assert [tuple(target.shape) for target in targets] == [(8, 16), (last, 16)]
    for seed, target in enumerate(targets):
        target.copy_(torch.randn(target.shape, generator=torch.Generator().manual_seed(seed)))
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    products = linear.fp32_products(x)
    assert [product.stride(0) * 4 % 16 for product in products] == [0, 0]
    for product, target in zip(products, targets, strict=True):
        torch.testing.assert_close(product, x.float() @ target.T)


@pytest.mark.parametrize("device, exact, dtype", [("cpu", False, torch.float32), ("meta", False, torch.bfloat16)])
def test_a_gpu_reads_compressor_weights_as_they_are_stored(device, exact, dtype):
    """bf16: widened, they would be twice the bytes of a decode step. A CPU would convert them in every call."""
    storage = Storage(WeightFormats(linear=FP8), torch.device(device))
    assert storage.plain_linear({"wkv": 8}, 128).weight.dtype == dtype


@pytest.mark.parametrize("first, products", [(128, 1), (192, 2), (256, 1)])
def test_fp8_rows_are_joined_at_the_end_of_a_block_of_scales_only(first, products):
    """Otherwise two checkpoint tensors would share a scale. Either way the results are those of separate linears."""
    storage, columns, parts = Storage(WeightFormats(linear=FP8), torch.device("cpu")), 256, {"a": first, "b": 100}
    shared = storage.linears(parts, columns)
    assert len(shared.products) == products
    generator = torch.Generator().manual_seed(0)
    alone = {name: storage.linear(name, rows, columns) for name, rows in parts.items()}
    targets = {key: binding.target for binding in shared.bindings() for key in binding.keys}
    for name, linear in alone.items():
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator))
        linear.weight_scale.copy_(torch.randint(120, 130, linear.weight_scale.shape, generator=generator))
        targets[f"{name}.weight"].copy_(linear.weight)
        targets[f"{name}.scale"].copy_(linear.weight_scale)
    activation = quantise(torch.randn(3, columns, generator=generator).bfloat16(), shared.activation)
    expected = [linear(*activation) for linear in alone.values()]
    # The bf16 results of fp32 sums in whatever order a library takes for the width: one rounding apart at most.
    for got, wanted in zip(shared.split(*activation), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=0)
    torch.testing.assert_close(shared(*activation), torch.cat(expected, -1), rtol=2**-7, atol=0)


def test_released_widths_are_joined():
    """V4-Flash and V4-Pro: query ranks and widths end at whole blocks."""
    from benchmarks.random_model import config_of
    from benchmarks.shapes import FLASH, PRO
    from model.linear import Fp8Linear

    for config in (config_of(FLASH), config_of(PRO)):
        assert isinstance(config, ModelConfig)
        widths = (config.q_lora_rank, config.num_attention_heads * config.head_dim, config.moe_intermediate_size)
        assert all(Fp8Linear.can_join({"first": rows, "second": 1}) for rows in widths)
    assert CONFIG["q_lora_rank"] % 128 == 0
