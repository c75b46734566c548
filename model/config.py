"""The constants of one DeepSeek-V4 model, read from its config.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from model.config_spelling import read_fields
from model.errors import CheckpointError

WINDOW, CSA, HCA = "window", "csa", "hca"
MAX_STREAMS = 16  # of the hyper-connection ops


@dataclass(frozen=True)
class ModelConfig:
    """One field per constant, in the spelling of the released config.json; lists have one entry per trunk layer."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    layer_kinds: tuple[str, ...]  # "window" | "csa" | "hca"
    compress_ratios: tuple[int, ...]  # 0 in window layers
    hash_layers: tuple[bool, ...]  # True: experts from the token table tid2eid, False: scored
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    swiglu_limit: float
    rope_theta: float  # window layers and MTP, never YaRN
    compress_rope_theta: float  # CSA and HCA layers, with YaRN
    yarn_factor: float = 1.0  # 1: no YaRN
    yarn_original_positions: int = 0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    max_position_embeddings: int = 1048576
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    n_shared_experts: int = 1
    num_nextn_predict_layers: int = 0
    has_dspark_drafter: bool = False  # mtp.* is a DSpark drafter: those keys are left alone
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    expert_dtype: str | None = None
    quantization: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        _check(self)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """From the contents of a config.json in any of the spellings that `model/config_spelling.py` lists."""
        return cls(**read_fields(config))

    @classmethod
    def from_directory(cls, directory: str | Path) -> "ModelConfig":
        return cls.from_dict(read_config_json(directory))

    @property
    def csa_ratio(self) -> int:
        """The ratio of the CSA layers, 0 if there is none."""
        return next(
            (ratio for ratio, kind in zip(self.compress_ratios, self.layer_kinds, strict=True) if kind == CSA), 0
        )

    @property
    def hca_ratio(self) -> int:
        """The ratio of the HCA layers, 0 if there is none."""
        return next(
            (ratio for ratio, kind in zip(self.compress_ratios, self.layer_kinds, strict=True) if kind == HCA), 0
        )

    def without_mtp(self) -> "ModelConfig":
        """The same model for a checkpoint that carries no MTP blocks."""
        return replace(self, num_nextn_predict_layers=0)


def read_config_json(directory: str | Path) -> dict[str, Any]:
    """The contents of `directory`/config.json."""
    path = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise CheckpointError(f"{directory} is not a directory; expected one with config.json and *.safetensors")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing; a checkpoint directory needs config.json and *.safetensors"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def _check(config: ModelConfig) -> None:
    """Relations between fields that the model takes for granted."""
    _check_layers(config)
    relations = (
        (config.hc_mult <= MAX_STREAMS, f"hc_mult must be at most {MAX_STREAMS}, got {config.hc_mult}"),
        (config.n_shared_experts == 1, f"n_shared_experts must be 1, got {config.n_shared_experts}"),
        (
            config.num_experts_per_tok <= config.n_routed_experts,
            f"num_experts_per_tok {config.num_experts_per_tok} exceeds n_routed_experts {config.n_routed_experts}",
        ),
        (
            config.num_attention_heads % config.o_groups == 0,
            f"o_groups {config.o_groups} must divide num_attention_heads {config.num_attention_heads}",
        ),
        (config.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim must be even, got {config.qk_rope_head_dim}"),
        (
            config.qk_rope_head_dim <= min(config.head_dim, config.index_head_dim),
            f"qk_rope_head_dim {config.qk_rope_head_dim} exceeds head_dim {config.head_dim} or index_head_dim "
            f"{config.index_head_dim}",
        ),
        (
            config.yarn_factor == 1.0 or config.yarn_original_positions > 0,
            f"YaRN with factor {config.yarn_factor} needs original_max_position_embeddings",
        ),
        (config.yarn_factor >= 1.0, f"the YaRN factor must be at least 1, got {config.yarn_factor}"),
    )
    for holds, message in relations:
        if not holds:
            raise CheckpointError(f"config.json: {message}")


def _check_layers(config: ModelConfig) -> None:
    layers = config.num_hidden_layers
    for name in ("layer_kinds", "compress_ratios", "hash_layers"):
        if len(getattr(config, name)) != layers:
            raise CheckpointError(f"{name} has {len(getattr(config, name))} entries, the model has {layers} layers")
    for layer, (kind, ratio) in enumerate(zip(config.layer_kinds, config.compress_ratios, strict=True)):
        if kind not in (WINDOW, CSA, HCA) or (kind == WINDOW) != (ratio == 0):
            raise CheckpointError(f"layer {layer}: kind {kind!r} does not go with compression ratio {ratio}")
    for kind in (CSA, HCA):
        ratios = sorted({r for r, k in zip(config.compress_ratios, config.layer_kinds, strict=True) if k == kind})
        if len(ratios) > 1:
            raise CheckpointError(
                f"{kind.upper()} layers have several ratios {ratios}; one ratio per kind is supported"
            )
