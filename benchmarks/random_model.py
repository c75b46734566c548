"""A model with random weights in the official format, made on the device: FP8 linears, MXFP4 experts.

Weights keep the size of what they multiply, so activations stay in the range that a trained model has. They are drawn
in their storage format, large ones in place, so that a model may fill a GPU's memory. Pools and compressor states are
filled as if `context` tokens had been read.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from benchmarks.inputs import E2M1_SPREAD, Inputs, fill_index_pool, fill_kv_pool
from benchmarks.shapes import Widths
from model.config import ModelConfig
from model.state import WINDOW_PAGE_SIZE, CacheFormat, LayerState, StateSizes, compressed_page_size
from model.storage import Storage
from model.transformer import DeepseekV4
from model.weight_formats import FP8, MXFP4, WeightFormats

Layers = Sequence[tuple[str, bool]]  # kind, experts from the token table
LAYERS: Layers = (("window", True), ("csa", False), ("hca", False), ("csa", False))  # each kind, and CSA twice
FLASH_LAYERS: Layers = (("window", True), ("window", True), ("csa", True), *(("hca", False), ("csa", False)) * 20)
CHUNK = 256  # rows of a prefill call that the window rings have room for
OF_SIZE_ONE = ("embed", "ape")  # parameters that are not multiplied with a row


def config_of(w: Widths, layers: Layers = LAYERS) -> ModelConfig:
    """These layers at the widths of a released model."""
    kinds, hashed = zip(*layers, strict=True)
    ratios = {"window": 0, "csa": w.csa_ratio, "hca": w.hca_ratio}
    return ModelConfig(
        vocab_size=w.vocab_size, hidden_size=w.hidden_size, num_hidden_layers=len(layers), layer_kinds=kinds,
        compress_ratios=tuple(ratios[kind] for kind in kinds), hash_layers=hashed,
        num_attention_heads=w.num_attention_heads, head_dim=w.head_dim, qk_rope_head_dim=w.rope_dim,
        q_lora_rank=w.q_lora_rank, o_groups=w.o_groups, o_lora_rank=w.o_lora_rank, sliding_window=w.sliding_window,
        index_n_heads=w.index_n_heads, index_head_dim=w.index_head_dim, index_topk=w.index_topk,
        n_routed_experts=w.n_routed_experts, num_experts_per_tok=w.num_experts_per_tok,
        moe_intermediate_size=w.moe_intermediate_size, routed_scaling_factor=w.routed_scaling_factor,
        swiglu_limit=w.swiglu_limit, rope_theta=1e4, compress_rope_theta=1.6e5, yarn_factor=16.0,
        yarn_original_positions=65536, hc_mult=w.hc_mult, hc_sinkhorn_iters=w.hc_sinkhorn_iters, eos_token_ids=(1,),
    )  # fmt: skip


@torch.no_grad()
def random_model(w: Widths, device: str | torch.device, layers: Layers = LAYERS, seed: int = 0) -> DeepseekV4:
    """The model, with a state for one short sequence; `seat` makes another one."""
    storage = Storage(WeightFormats(linear=FP8, experts=MXFP4), torch.device(device))
    sizes = StateSizes(1, CHUNK, CHUNK, w.sliding_window)
    model = DeepseekV4(config_of(w, layers), storage, CacheFormat(), sizes).eval()
    inputs = Inputs(device, seed)
    for module in model.modules():
        parameters = dict(module.named_parameters(recurse=False))
        for name in parameters:
            fill_parameter(inputs, name, parameters)
    choices = model.hash_experts  # a token's experts in the hash layers are all different
    for table in choices:
        table.copy_(inputs.uniform(len(table), w.n_routed_experts).topk(choices.shape[-1]).indices)
    return model


def fill_parameter(inputs: Inputs, name: str, parameters: Mapping[str, nn.Parameter]) -> None:
    """Random values for the parameter `name`, one of the parameters of a module."""
    parameter = parameters[name]
    shape, generator = parameter.shape, inputs.generator
    if name.endswith("_scale"):
        weight = parameters[name.removesuffix("_scale")]
        packed = weight.dtype == torch.uint8
        columns = weight.shape[-1] * (2 if packed else 1)
        parameter.copy_(inputs.exponents(columns, E2M1_SPREAD if packed else 1, *shape))
    elif parameter.dtype == torch.float8_e4m3fn:
        parameter.copy_(inputs.fp8_codes(*shape).view(parameter.dtype))
    elif parameter.dtype == torch.uint8:
        parameter.random_(0, 256, generator=generator)
    elif not parameter.is_floating_point():
        parameter.zero_()
    elif name.endswith("norm"):
        parameter.copy_(inputs.norm_weight(*shape))
    elif name == "scale":
        parameter.uniform_(generator=generator)
    else:
        size = 1.0 if name in OF_SIZE_ONE else 0.1 if parameter.dim() == 1 else shape[-1] ** -0.5
        parameter.normal_(0.0, size, generator=generator)


@torch.no_grad()
def seat(model: DeepseekV4, batch: int, context: int, steps: int, seed: int = 1) -> None:
    """Give the model a state of `batch` sequences that have read `context` tokens and may decode `steps` more."""
    config, inputs = model.config, Inputs(model.storage.device, seed)
    model.allocate(StateSizes(batch, context + steps, min(CHUNK, context), config.sliding_window))
    for layer, ratio in zip(model.state.layers, config.compress_ratios, strict=True):
        fill_layer(inputs, layer, ratio, config)
    state = model.state
    state.token.copy_(inputs.integers(2, config.vocab_size, batch, dtype=torch.int64))
    state.eos.fill_(-1)  # never stop
    rewind(model, context)


def rewind(model: DeepseekV4, context: int) -> None:
    model.state.position.fill_(context)
    model.state.active.fill_(True)


def fill_layer(inputs: Inputs, layer: LayerState, ratio: int, config: ModelConfig) -> None:
    """Random entries in the pools of a layer and random tokens in its compressor states."""
    dims = config.head_dim, config.qk_rope_head_dim
    fill_kv_pool(inputs, layer.window_pool, WINDOW_PAGE_SIZE, *dims)
    buffers = dict(layer.named_buffers())
    if "compressed_pool" in buffers:
        fill_kv_pool(inputs, layer.compressed_pool, compressed_page_size(ratio), *dims)
    if "index_pool" in buffers:
        fill_index_pool(inputs, layer.index_pool, compressed_page_size(ratio), config.index_head_dim, fp8=False)
    for name in buffers.keys() & {"compressor_state", "index_state"}:
        buffers[name].copy_(inputs.normal(*buffers[name].shape, dtype=torch.float32))
