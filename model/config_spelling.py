"""The three spellings of a DeepSeek-V4 config.json, read into the fields of `ModelConfig`.

hub           compress_ratios, num_hash_layers, qk_rope_head_dim, rope_scaling {type: yarn, ...}
transformers  layer_types + compress_rates, mlp_layer_types, rope_parameters {main, compress} (save_pretrained)
inference     dim, n_layers, n_heads, rope_head_dim, rope_factor ... (config.json of the official inference code)

A constant that shapes the model has no default here: transformers' class defaults fit neither released model.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from model.errors import CheckpointError

# field: spellings; the first one present counts.
INTEGERS = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_heads"),
    "head_dim": ("head_dim",),
    "q_lora_rank": ("q_lora_rank",),
    "o_groups": ("o_groups",),
    "o_lora_rank": ("o_lora_rank",),
    "sliding_window": ("sliding_window", "window_size"),
    "index_n_heads": ("index_n_heads",),
    "index_head_dim": ("index_head_dim",),
    "index_topk": ("index_topk",),
    "n_routed_experts": ("n_routed_experts", "num_local_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "n_activated_experts"),
    "moe_intermediate_size": ("moe_intermediate_size", "moe_inter_dim"),
}
OPTIONAL_INTEGERS = {
    "hc_mult": ("hc_mult",),
    "hc_sinkhorn_iters": ("hc_sinkhorn_iters",),
    "n_shared_experts": ("n_shared_experts",),
    "max_position_embeddings": ("max_position_embeddings",),
}
NUMBERS = {
    "routed_scaling_factor": ("routed_scaling_factor", "route_scale"),
    "swiglu_limit": ("swiglu_limit",),
    "rope_theta": ("rope_theta",),
    "compress_rope_theta": ("compress_rope_theta",),
}
OPTIONAL_NUMBERS = {"hc_eps": ("hc_eps",), "rms_norm_eps": ("rms_norm_eps", "norm_eps")}
KIND_OF_LAYER_TYPE = {
    "sliding_attention": "window",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
KIND_OF_RATIO = {0: "window", 4: "csa", 128: "hca"}
# (spellings, the only supported value)
FIXED = (
    (("model_type",), "deepseek_v4"),
    (("scoring_func", "score_func"), "sqrtsoftplus"),
    (("num_key_value_heads",), 1),
    (("norm_topk_prob",), True),
    (("tie_word_embeddings",), False),
    (("hidden_act",), "silu"),
    (("attention_bias",), False),
    (("mlp_bias",), False),
    (("topk_method",), "noaux_tc"),
)


def read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `ModelConfig` from the contents of a config.json in any spelling."""
    for names, supported in FIXED:
        value = _first(config, names)
        if value is not None and value != supported:
            raise CheckpointError(f"config.json: {names[0]} {value!r} is not supported, only {supported!r}")
    config = _flatten_rope(config)
    missing = [names[0] for names in (INTEGERS | NUMBERS).values() if _first(config, names) is None]
    if missing:
        raise CheckpointError(f"config.json lacks {', '.join(missing)}")
    fields = {field: _integer(names[0], _first(config, names), 1) for field, names in INTEGERS.items()}
    fields |= {field: _number(names[0], _first(config, names)) for field, names in NUMBERS.items()}
    fields |= _optional(config, OPTIONAL_INTEGERS, lambda name, value: _integer(name, value, 1))
    fields |= _optional(config, OPTIONAL_NUMBERS, _number)
    layers = fields["num_hidden_layers"]
    return {
        **fields,
        **_layer_kinds(config, layers),
        "hash_layers": _hash_layers(config, layers),
        "qk_rope_head_dim": _rope_dim(config, fields["head_dim"]),
        **_yarn(config),
        **_mtp(config),
        **_token_ids(config),
        "expert_dtype": config.get("expert_dtype"),
        "quantization": dict(_object(config, "quantization_config")),
    }


def _layer_kinds(config: Mapping[str, Any], layers: int) -> dict[str, tuple]:
    """Kind and ratio of every trunk layer, from compress_ratios, from layer_types + compress_rates, or from both."""
    ratios, types = _list(config, "compress_ratios"), _list(config, "layer_types")
    rates = _object(config, "compress_rates")
    if ratios is None and types is None:
        raise CheckpointError("config.json lacks compress_ratios (or layer_types with compress_rates)")
    if ratios is not None:
        ratios = [_integer("compress_ratios", ratio, 0) for ratio in ratios]
        _require_length("compress_ratios", ratios, layers)
        if any(ratios[layers:]):
            raise CheckpointError(
                f"config.json: MTP blocks with compression {ratios[layers:]} are not supported, only 0"
            )
        ratios = ratios[:layers]
    if types is None:
        unknown = sorted(set(ratios) - set(KIND_OF_RATIO))
        if unknown:
            raise CheckpointError(
                f"config.json: compress_ratios {unknown} could be CSA or HCA (4 is CSA, 128 is HCA); "
                f"add layer_types with one of {', '.join(KIND_OF_LAYER_TYPE)} per layer"
            )
        return {"layer_kinds": tuple(KIND_OF_RATIO[ratio] for ratio in ratios), "compress_ratios": tuple(ratios)}
    _require_length("layer_types", types, layers)
    unknown = [name for name in types if name not in KIND_OF_LAYER_TYPE]
    if unknown:
        raise CheckpointError(f"config.json: layer_types {unknown[0]!r} is not one of {', '.join(KIND_OF_LAYER_TYPE)}")
    if ratios is None:
        ratios = [_rate(rates, name) for name in types[:layers]]
    return {
        "layer_kinds": tuple(KIND_OF_LAYER_TYPE[name] for name in types[:layers]),
        "compress_ratios": tuple(ratios),
    }


def _rate(rates: Mapping[str, Any], layer_type: str) -> int:
    if KIND_OF_LAYER_TYPE[layer_type] == "window":
        return 0
    if layer_type not in rates:
        raise CheckpointError(f"config.json: layer_types needs compress_rates with an entry for {layer_type}")
    return _integer(f"compress_rates.{layer_type}", rates[layer_type], 1)


def _hash_layers(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    types = _list(config, "mlp_layer_types")
    if types is not None:
        _require_length("mlp_layer_types", types, layers)
        unknown = [name for name in types if name not in ("hash_moe", "moe")]
        if unknown:
            raise CheckpointError(f"config.json: mlp_layer_types {unknown[0]!r} is not one of hash_moe, moe")
        return tuple(name == "hash_moe" for name in types[:layers])
    count = _first(config, ("num_hash_layers", "n_hash_layers"))
    if count is None:
        raise CheckpointError("config.json lacks num_hash_layers (or mlp_layer_types)")
    count = _integer("num_hash_layers", count, 0)
    return tuple(layer < count for layer in range(layers))


def _flatten_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers nests rope constants as rope_parameters {main, compress}; the nested values are the ones it uses."""
    parameters = _object(config, "rope_parameters")
    main, compress = parameters.get("main"), parameters.get("compress")
    if not isinstance(main, Mapping) or not isinstance(compress, Mapping):
        return {**config, "rope_scaling": _object(config, "rope_scaling") or parameters}
    if main.get("rope_type", "default") != "default":
        raise CheckpointError(f"config.json: rope_parameters.main must be plain rope, got {main.get('rope_type')!r}")
    flat = {**config, "rope_scaling": compress}
    for name, value in (
        ("rope_theta", main.get("rope_theta")),
        ("compress_rope_theta", compress.get("rope_theta")),
        ("partial_rotary_factor", main.get("partial_rotary_factor")),
    ):
        if value is not None:
            flat[name] = value
    return flat


def _rope_dim(config: Mapping[str, Any], head_dim: int) -> int:
    dim = _first(config, ("qk_rope_head_dim", "rope_head_dim"))
    if dim is not None:
        return _integer("qk_rope_head_dim", dim, 2)
    if config.get("partial_rotary_factor") is None:
        raise CheckpointError("config.json lacks qk_rope_head_dim (or partial_rotary_factor)")
    return int(head_dim * _number("partial_rotary_factor", config["partial_rotary_factor"]))


def _yarn(config: Mapping[str, Any]) -> dict[str, Any]:
    scaling = _object(config, "rope_scaling")
    kind = scaling.get("rope_type") or scaling.get("type") or ("yarn" if "factor" in scaling else "default")
    if kind not in ("yarn", "default"):
        raise CheckpointError(f"config.json: rope type {kind!r} is not supported, only yarn and default")
    if scaling.get("attention_factor") not in (None, 1, 1.0):
        raise CheckpointError(f"config.json: attention_factor must be 1, got {scaling['attention_factor']}")
    if kind == "default":  # the inference code has no rope_scaling; original_seq_len 0 switches YaRN off there
        scaling = {
            "factor": config.get("rope_factor"),
            "original_max_position_embeddings": config.get("original_seq_len"),
            "beta_fast": config.get("beta_fast"),
            "beta_slow": config.get("beta_slow"),
        }
        if not scaling["original_max_position_embeddings"] or not scaling["factor"]:
            return {}
    original = scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if scaling.get("factor") is None or original is None:
        raise CheckpointError("config.json: YaRN needs factor and original_max_position_embeddings")
    return {
        "yarn_factor": _number("factor", scaling["factor"]),
        "yarn_original_positions": _integer("original_max_position_embeddings", original, 1),
        "yarn_beta_fast": _number("beta_fast", _or(scaling.get("beta_fast"), 32)),
        "yarn_beta_slow": _number("beta_slow", _or(scaling.get("beta_slow"), 1)),
    }


def _mtp(config: Mapping[str, Any]) -> dict[str, Any]:
    """Later releases keep a DSpark drafter under mtp.*, which is not a multi-token-prediction block."""
    if any(name.startswith("dspark_") for name in config):
        return {"num_nextn_predict_layers": 0, "has_dspark_drafter": True}
    count = _first(config, ("num_nextn_predict_layers", "n_mtp_layers"))
    default = 1 if "n_layers" in config else 0  # the inference code has one unless told otherwise
    return {"num_nextn_predict_layers": _integer("num_nextn_predict_layers", _or(count, default), 0)}


def _token_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    eos = config.get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    bos = config.get("bos_token_id")
    return {
        "bos_token_id": None if bos is None else _integer("bos_token_id", bos, 0),
        "eos_token_ids": tuple(_integer("eos_token_id", token, 0) for token in eos),
    }


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _optional(config: Mapping[str, Any], table: dict[str, tuple[str, ...]], read: Callable) -> dict[str, Any]:
    values = {field: (names[0], _first(config, names)) for field, names in table.items()}
    return {field: read(name, value) for field, (name, value) in values.items() if value is not None}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _integer(name: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise CheckpointError(f"config.json: {name} must be an integer >= {minimum}, got {value!r}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json: {name} must be a positive number, got {value!r}")
    return float(value)


def _list(config: Mapping[str, Any], name: str) -> list | None:
    value = config.get(name)
    if value is not None and not isinstance(value, (list, tuple)):
        raise CheckpointError(f"config.json: {name} must be a list, got {value!r}")
    return value


def _object(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise CheckpointError(f"config.json: {name} must be an object, got {value!r}")
    return value or {}


def _require_length(name: str, values: list, layers: int) -> None:
    if len(values) < layers:
        raise CheckpointError(f"config.json: {name} has {len(values)} entries, the model has {layers} layers")
