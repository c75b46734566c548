"""Random checkpoints with the released key names, for comparisons with transformers.

Scales are those of a network that works: projections keep the size of their input, norm weights are near 1, logits have
a standard deviation between 1 and 2.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint_keys import linears, plain_tensors
from model.config import ModelConfig

HEAD_GAIN = 1.5  # standard deviation of the logits


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A config.json in the hub's spelling that transformers and this project both read: 4 layers, ratios 0, 4 and 128.

    64 indexer heads: with fewer a key can score exactly zero in all of them, and engines break that tie differently.
    """
    config = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "vocab_size": 96,
        "hidden_size": 64,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_hash_layers": 1,
        "num_nextn_predict_layers": 0,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "qk_rope_head_dim": 32,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 32,
        "sliding_window": 8,
        "compress_ratios": [0, 4, 128, 4],
        "index_n_heads": 64,
        "index_head_dim": 32,
        "index_topk": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }
    return config | changes


def small_ratio_config(csa: int = 4, hca: int = 8, **changes: Any) -> dict[str, Any]:
    """`tiny_config` in transformers' spelling of the layers, in which ratios other than 4 and 128 can be written."""
    config = tiny_config(**changes)
    del config["compress_ratios"]
    sparse, heavy = "compressed_sparse_attention", "heavily_compressed_attention"
    return config | {
        "layer_types": ["sliding_attention", sparse, heavy, sparse],
        "compress_rates": {sparse: csa, heavy: hca},
    }


def random_tensors(config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Every tensor of the model; bf16 keeps in fp32 what the released checkpoints keep, fp32 has no bf16 at all."""
    model = ModelConfig.from_dict(config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{name}.weight": torch.randn(rows, columns, generator=generator).mul_(columns**-0.5).to(dtype)
        for name, rows, columns in linears(model)
    }
    for key, shape, dtypes in plain_tensors(model):
        if key.endswith("tid2eid"):
            tensors[key] = _hash_table(model, generator)
        else:
            value = _random(key, torch.randn(shape, generator=generator))
            tensors[key] = value.to(dtype if dtypes[0] == "BF16" else torch.float32)
    return tensors


def write_random_checkpoint(
    directory: str | Path, config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Write model.safetensors and config.json into `directory` and return the tensors."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(config, seed, dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = config | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return tensors


def _random(key: str, noise: Tensor) -> Tensor:
    """Noise scaled for the tensor's place in the network."""
    leaf = key.removesuffix(".weight").rpartition(".")[2]
    if leaf.endswith("norm"):
        return 1 + 0.1 * noise
    if leaf.endswith("_scale"):  # of the hyper-connection mixes
        return 0.5 + noise.abs()
    if leaf in ("bias", "embed", "head"):
        return noise * {"bias": 0.1, "embed": 1.0, "head": HEAD_GAIN * noise.shape[-1] ** -0.5}[leaf]
    if noise.dim() == 1:  # attention sink, base of the mixes
        return 0.5 * noise
    return noise * (0.5 if leaf == "ape" else noise.shape[-1] ** -0.5)


def _hash_table(config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Distinct random experts for each token, int64 [vocab_size, num_experts_per_tok]."""
    order = torch.rand(config.vocab_size, config.n_routed_experts, generator=generator).argsort(dim=-1)
    return order[:, : config.num_experts_per_tok].contiguous()
