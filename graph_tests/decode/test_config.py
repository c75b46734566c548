"""config.json in every spelling. The judge of the released ones is transformers' own reading of the same dictionary."""

import copy
import dataclasses
import json

import pytest
from transformers import DeepseekV4Config

from graph_tests.random_checkpoint import small_ratio_config, tiny_config
from graph_tests.released import FLASH, FLASH_INFERENCE, PRO
from model.config import ModelConfig
from model.errors import CheckpointError

KINDS = {
    "sliding_attention": "window",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
SAME_NAME = [
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "qk_rope_head_dim",
    "q_lora_rank", "o_groups", "o_lora_rank", "sliding_window", "index_n_heads", "index_head_dim", "index_topk",
    "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "routed_scaling_factor", "swiglu_limit",
    "rope_theta", "compress_rope_theta", "max_position_embeddings", "hc_mult", "hc_sinkhorn_iters", "hc_eps",
    "rms_norm_eps", "num_nextn_predict_layers", "bos_token_id",
]  # fmt: skip
ALL = [FLASH, PRO, tiny_config(), small_ratio_config(csa=2, hca=6)]
ALL_NAMES = ["flash", "pro", "tiny", "small ratios"]


@pytest.mark.parametrize("config", ALL, ids=ALL_NAMES)
def test_every_constant_is_what_transformers_reads(config):
    ours, theirs = ModelConfig.from_dict(config), DeepseekV4Config(**json.loads(json.dumps(config)))
    for name in SAME_NAME:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.layer_kinds == tuple(KINDS[name] for name in theirs.layer_types)
    rates = [theirs.compress_rates.get(name, 0) for name in theirs.layer_types]
    assert ours.compress_ratios == tuple(rates)
    assert ours.hash_layers == tuple(name == "hash_moe" for name in theirs.mlp_layer_types)
    assert ours.eos_token_ids == (theirs.eos_token_id,)


@pytest.mark.parametrize("config", ALL, ids=ALL_NAMES)
def test_yarn_is_what_transformers_applies_to_compressed_layers(config):
    ours, theirs = ModelConfig.from_dict(config), DeepseekV4Config(**json.loads(json.dumps(config)))
    compress = theirs.rope_parameters["compress"]
    assert compress["rope_type"] == "yarn" and theirs.rope_parameters["main"]["rope_type"] == "default"
    assert ours.yarn_factor == compress["factor"]
    assert ours.yarn_original_positions == compress["original_max_position_embeddings"]
    assert (ours.yarn_beta_fast, ours.yarn_beta_slow) == (compress["beta_fast"], compress["beta_slow"])


@pytest.mark.parametrize("config", ALL, ids=ALL_NAMES)
def test_config_saved_by_transformers_reads_the_same(config, tmp_path):
    DeepseekV4Config(**json.loads(json.dumps(config))).save_pretrained(tmp_path)
    saved, original = ModelConfig.from_directory(tmp_path), ModelConfig.from_dict(config)
    for field in dataclasses.fields(ModelConfig):
        if field.name not in ("quantization", "expert_dtype"):  # transformers rearranges these
            assert getattr(saved, field.name) == getattr(original, field.name), field.name


def test_inference_spelling_reads_like_the_hub_spelling():
    hub, inference = ModelConfig.from_dict(FLASH), ModelConfig.from_dict(FLASH_INFERENCE)
    for field in dataclasses.fields(ModelConfig):
        if field.name not in ("quantization", "bos_token_id", "eos_token_ids"):  # not in the inference file
            assert getattr(hub, field.name) == getattr(inference, field.name), field.name


def test_flash_has_two_window_layers_then_csa_and_hca_in_turn():
    config = ModelConfig.from_dict(FLASH)
    assert config.layer_kinds == ("window", "window", *("csa", "hca") * 20, "csa")
    assert (config.csa_ratio, config.hca_ratio) == (4, 128)
    assert config.hash_layers == (True, True, True) + (False,) * 40


def test_missing_rope_scaling_means_no_yarn():
    config = tiny_config()
    del config["rope_scaling"]
    assert ModelConfig.from_dict(config).yarn_factor == 1.0


def test_eos_token_may_be_a_list():
    assert ModelConfig.from_dict(tiny_config(eos_token_id=[1, 5])).eos_token_ids == (1, 5)


def test_layer_types_name_the_kind_of_other_ratios():
    """compress_ratios [0, 2, 16, 2] alone cannot tell CSA from HCA."""
    types = small_ratio_config()["layer_types"]
    config = ModelConfig.from_dict(tiny_config(compress_ratios=[0, 2, 16, 2], layer_types=types))
    assert config.layer_kinds == ("window", "csa", "hca", "csa")
    assert config.compress_ratios == (0, 2, 16, 2)


def test_dspark_drafter_is_not_an_mtp_block():
    config = ModelConfig.from_dict(FLASH | {"dspark_block_size": 5})
    assert config.has_dspark_drafter and config.num_nextn_predict_layers == 0


def test_config_can_be_hashed_and_copied_with_its_model():
    config = ModelConfig.from_dict(FLASH)
    assert hash(config) == hash(ModelConfig.from_dict(dict(FLASH))) and copy.deepcopy(config) == config


UNSUPPORTED = {
    "other model": ({"model_type": "deepseek_v41"}, "model_type 'deepseek_v41'"),
    "older model": ({"model_type": "deepseek_v3"}, "model_type 'deepseek_v3'"),
    "router score": ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
    "two shared experts": ({"n_shared_experts": 2}, "n_shared_experts must be 1"),
    "too many streams": ({"hc_mult": 17}, "hc_mult must be at most 16"),
    "weights not normalised": ({"norm_topk_prob": False}, "norm_topk_prob False"),
    "tied head": ({"tie_word_embeddings": True}, "tie_word_embeddings True"),
    "several kv heads": ({"num_key_value_heads": 8}, "num_key_value_heads 8"),
    "ambiguous ratio": ({"compress_ratios": [0, 4, 64, 4]}, "add layer_types"),
    "compressed mtp": ({"compress_ratios": [0, 4, 128, 4, 4]}, "MTP blocks"),
    "too few ratios": ({"compress_ratios": [0, 4, 128]}, "3 entries, the model has 4"),
    "other rope": ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear'"),
    "mscale": (
        {"rope_scaling": tiny_config()["rope_scaling"] | {"attention_factor": 1.27}},
        "attention_factor must be 1",
    ),
    "text for a number": ({"hidden_size": "64"}, "hidden_size must be an integer >= 1, got '64'"),
    "zero": ({"head_dim": 0}, "head_dim must be an integer >= 1"),
    "nan": ({"swiglu_limit": float("nan")}, "swiglu_limit must be a positive number"),
    "more picks than experts": ({"num_experts_per_tok": 9}, "exceeds n_routed_experts 8"),
    "groups": ({"o_groups": 3}, "o_groups 3 must divide"),
    "rope wider than head": ({"qk_rope_head_dim": 128}, "qk_rope_head_dim 128 exceeds"),
    "list for an object": ({"quantization_config": ["fp8"]}, "quantization_config must be an object"),
}


@pytest.mark.parametrize("changes, message", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_config_is_refused_in_one_line(changes, message):
    with pytest.raises(CheckpointError) as error:
        ModelConfig.from_dict(tiny_config(**changes))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_two_ratios_of_one_kind_are_refused():
    types = small_ratio_config()["layer_types"]
    with pytest.raises(CheckpointError, match=r"CSA layers have several ratios \[2, 4\]"):
        ModelConfig.from_dict(tiny_config(compress_ratios=[0, 2, 16, 4], layer_types=types))


def test_ratio_on_a_window_layer_is_refused():
    types = small_ratio_config()["layer_types"]
    with pytest.raises(CheckpointError, match="layer 0: kind 'window' does not go with compression ratio 4"):
        ModelConfig.from_dict(tiny_config(compress_ratios=[4, 4, 128, 4], layer_types=types))


def test_missing_constants_are_listed_together():
    config = tiny_config()
    del config["o_groups"], config["hidden_size"]
    with pytest.raises(CheckpointError, match="lacks hidden_size, o_groups"):
        ModelConfig.from_dict(config)


def test_schedule_has_no_default():
    """transformers' default schedule fits neither released model, so a config without one must not load."""
    config = tiny_config()
    del config["compress_ratios"]
    with pytest.raises(CheckpointError, match="lacks compress_ratios"):
        ModelConfig.from_dict(config)


@pytest.mark.parametrize("text, message", [("{", "cannot be read as JSON"), ("[]", "must hold a JSON object")])
def test_broken_config_json_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_directory(tmp_path)


def test_missing_config_json_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="config.json is missing"):
        ModelConfig.from_directory(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        ModelConfig.from_directory(tmp_path / "nowhere")
