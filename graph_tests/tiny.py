"""A tiny model whose dimensions every weight format allows, with all three block kinds, hash and scored layers."""

from pathlib import Path
from typing import Any

from graph_tests.random_checkpoint import small_ratio_config, write_random_checkpoint
from model.convert import convert

FORMATS = ("bf16", "official", "nvfp4-experts", "nvfp4")
KINDS = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")


def quantisable_config(layers: int = 4, **changes: Any) -> dict[str, Any]:
    """Every dimension along which weights are scaled is a multiple of 128; window 8, ratios 4 and 8, top-k 4."""
    sizes = {
        "num_hidden_layers": layers,
        "num_hash_layers": 2,
        "hidden_size": 128,
        "moe_intermediate_size": 128,
        "q_lora_rank": 128,
        "head_dim": 128,
        "qk_rope_head_dim": 64,
        "o_lora_rank": 128,
        "index_n_heads": 8,
        "index_head_dim": 64,
    }
    return small_ratio_config(**sizes | changes) | {"layer_types": [KINDS[layer % 3] for layer in range(layers)]}


def tiny_checkpoint(directory: Path, weight_format: str = "bf16", seed: int = 0, **changes: Any) -> Path:
    """A random checkpoint of `quantisable_config` in one of FORMATS, under `directory`."""
    source, target = directory / "bf16", directory / weight_format
    if not source.exists():
        write_random_checkpoint(source, quantisable_config(**changes), seed)
    if not target.exists():
        convert(source, target, weight_format, progress=False)
    return target
