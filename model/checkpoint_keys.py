"""Every tensor that a checkpoint must hold: key, shape and storage type, derived from the config alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from model.config import CSA, HCA, WINDOW, ModelConfig
from model.errors import CheckpointError
from model.weight_formats import DENSE, F32, FP8, FP8_BLOCK, MXFP4, MXFP4_GROUP, NVFP4, NVFP4_GROUP, WeightFormats

# Storage types by safetensors' names; the first is what the released checkpoints have.
BF16_CLASS = ("BF16", "F32")
FP32_CLASS = ("F32", "BF16")
INTEGER_CLASS = ("I64", "I32")
E4M3_CLASS = ("F8_E4M3",)
E8M0_CLASS = ("F8_E8M0", "U8")
FLOAT32_ONLY = ("F32",)
ITEM_SIZE = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E8M0": 1}


@dataclass(frozen=True, slots=True)
class Expected:
    """Shape of a tensor and the storage types it may have, the released one first."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the released storage type."""
        return prod(self.shape) * ITEM_SIZE[self.dtypes[0]]


def expected_keys(config: ModelConfig, formats: WeightFormats) -> dict[str, Expected]:
    """All tensors of a checkpoint of this model in these formats, MTP blocks included."""
    tensors = {key: Expected(shape, dtypes) for key, shape, dtypes in plain_tensors(config)}
    for name, rows, columns in linears(config):
        for key, shape, dtypes in _linear_tensors(name, rows, columns, formats):
            tensors[key] = Expected(shape, dtypes)
    return tensors


def blocks(config: ModelConfig) -> Iterator[tuple[str, str, int, bool]]:
    """(prefix, kind, ratio, has a hash table) of each trunk layer, then of each MTP block."""
    for layer, kind in enumerate(config.layer_kinds):
        yield f"layers.{layer}", kind, config.compress_ratios[layer], config.hash_layers[layer]
    for layer in range(config.num_nextn_predict_layers):
        yield f"mtp.{layer}", WINDOW, 0, False


def linears(config: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """(name, output size, input size) of every linear that may be quantised."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    for block, kind, _, _ in blocks(config):
        if block.startswith("mtp."):
            yield f"{block}.e_proj", hidden, hidden
            yield f"{block}.h_proj", hidden, hidden
        yield f"{block}.attn.wq_a", config.q_lora_rank, hidden
        yield f"{block}.attn.wq_b", heads, config.q_lora_rank
        yield f"{block}.attn.wkv", config.head_dim, hidden
        yield f"{block}.attn.wo_a", config.o_groups * config.o_lora_rank, heads // config.o_groups
        yield f"{block}.attn.wo_b", hidden, config.o_groups * config.o_lora_rank
        if kind == CSA:
            yield f"{block}.attn.indexer.wq_b", config.index_n_heads * config.index_head_dim, config.q_lora_rank
        experts = [f"experts.{expert}" for expert in range(config.n_routed_experts)]
        for expert in ("shared_experts", *experts):
            yield f"{block}.ffn.{expert}.w1", config.moe_intermediate_size, hidden
            yield f"{block}.ffn.{expert}.w2", hidden, config.moe_intermediate_size
            yield f"{block}.ffn.{expert}.w3", config.moe_intermediate_size, hidden


def plain_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """(key, shape, storage types) of everything that is never quantised."""
    hidden = config.hidden_size
    yield "embed.weight", (config.vocab_size, hidden), BF16_CLASS
    yield "head.weight", (config.vocab_size, hidden), BF16_CLASS
    yield "norm.weight", (hidden,), BF16_CLASS
    yield from _hc_head("", config)
    for block, kind, ratio, has_table in blocks(config):
        yield from _block_tensors(block, config)
        yield from _gate_tensors(f"{block}.ffn.gate", config, has_table)
        if kind == CSA:
            yield from _compressor(f"{block}.attn.compressor", config, ratio, config.head_dim, 2)
            yield f"{block}.attn.indexer.weights_proj.weight", (config.index_n_heads, hidden), BF16_CLASS
            yield from _compressor(f"{block}.attn.indexer.compressor", config, ratio, config.index_head_dim, 2)
        if kind == HCA:
            yield from _compressor(f"{block}.attn.compressor", config, ratio, config.head_dim, 1)
        if block.startswith("mtp."):
            for norm in ("enorm", "hnorm", "norm"):
                yield f"{block}.{norm}.weight", (hidden,), BF16_CLASS
            yield from _hc_head(f"{block}.", config)


def _block_tensors(block: str, config: ModelConfig):
    hidden, streams = config.hidden_size, config.hc_mult
    yield f"{block}.attn_norm.weight", (hidden,), BF16_CLASS
    yield f"{block}.ffn_norm.weight", (hidden,), BF16_CLASS
    for part in ("hc_attn", "hc_ffn"):
        yield f"{block}.{part}_fn", ((2 + streams) * streams, streams * hidden), FP32_CLASS
        yield f"{block}.{part}_base", ((2 + streams) * streams,), FP32_CLASS
        yield f"{block}.{part}_scale", (3,), FP32_CLASS
    yield f"{block}.attn.attn_sink", (config.num_attention_heads,), FP32_CLASS
    yield f"{block}.attn.q_norm.weight", (config.q_lora_rank,), BF16_CLASS
    yield f"{block}.attn.kv_norm.weight", (config.head_dim,), BF16_CLASS


def _gate_tensors(gate: str, config: ModelConfig, has_table: bool):
    yield f"{gate}.weight", (config.n_routed_experts, config.hidden_size), BF16_CLASS
    if has_table:
        yield f"{gate}.tid2eid", (config.vocab_size, config.num_experts_per_tok), INTEGER_CLASS
    else:
        yield f"{gate}.bias", (config.n_routed_experts,), FP32_CLASS


def _compressor(name: str, config: ModelConfig, ratio: int, dim: int, halves: int):
    """`halves` is 2 where groups overlap (CSA): one half for the next group, one for the own."""
    yield f"{name}.ape", (ratio, halves * dim), FP32_CLASS
    yield f"{name}.wkv.weight", (halves * dim, config.hidden_size), BF16_CLASS
    yield f"{name}.wgate.weight", (halves * dim, config.hidden_size), BF16_CLASS
    yield f"{name}.norm.weight", (dim,), BF16_CLASS


def _hc_head(prefix: str, config: ModelConfig):
    yield f"{prefix}hc_head_fn", (config.hc_mult, config.hc_mult * config.hidden_size), FP32_CLASS
    yield f"{prefix}hc_head_base", (config.hc_mult,), FP32_CLASS
    yield f"{prefix}hc_head_scale", (1,), FP32_CLASS


def _linear_tensors(name: str, rows: int, columns: int, formats: WeightFormats):
    kind = formats.of(name)
    group = {MXFP4: MXFP4_GROUP, NVFP4: NVFP4_GROUP}.get(kind, 1)
    if columns % group:
        raise CheckpointError(f"{name}: {kind} needs an input size that is a multiple of {group}, got {columns}")
    if kind == DENSE:
        yield f"{name}.weight", (rows, columns), BF16_CLASS
    elif kind == FP8:
        scale_class = FLOAT32_ONLY if formats.fp8_scale == F32 else E8M0_CLASS
        yield f"{name}.weight", (rows, columns), E4M3_CLASS
        yield f"{name}.scale", (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)), scale_class
    elif kind == MXFP4:
        yield f"{name}.weight", (rows, columns // 2), ("I8", "U8")
        yield f"{name}.scale", (rows, columns // MXFP4_GROUP), E8M0_CLASS
    else:
        yield f"{name}.weight", (rows, columns // 2), ("U8", "I8")
        yield f"{name}.weight_scale", (rows, columns // NVFP4_GROUP), E4M3_CLASS
        yield f"{name}.weight_scale_2", (), FLOAT32_ONLY
        if formats.input_scales:
            yield f"{name}.input_scale", (), FLOAT32_ONLY
