"""Checkpoint directories: what must be in them, and a clear refusal of everything else."""

import json

import pytest
import torch
from safetensors.torch import save_file

from graph_tests.random_checkpoint import random_tensors, small_ratio_config, tiny_config, write_random_checkpoint
from graph_tests.released import FLASH, FLASH_CENSUS, FLASH_NVFP4_CENSUS, PRO, PRO_CENSUS
from model.checkpoint import INDEX_NAME, Checkpoint, validate
from model.checkpoint_keys import expected_keys
from model.config import ModelConfig
from model.errors import CheckpointError
from model.weight_formats import WeightFormats

OFFICIAL = WeightFormats("fp8", "mxfp4", "fp8", "mxfp4")
MODELOPT = WeightFormats("fp8", "nvfp4", "fp8", "mxfp4", input_scales=True)
MTP = {"num_nextn_predict_layers": 1, "compress_ratios": [0, 4, 128, 4, 0]}


@pytest.fixture
def config():
    return tiny_config(**MTP)


@pytest.fixture
def tensors(config):
    return random_tensors(config)


def write(directory, config, tensors):
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")


def write_shards(directory, config, tensors, count=3):
    """The same tensors in `count` files and an index."""
    (directory / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for shard in range(count):
        part = {key: tensors[key] for key in list(tensors)[shard::count]}
        save_file(part, directory / f"model-{shard}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{shard}.safetensors")
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def check(directory):
    return validate(Checkpoint(directory), ModelConfig.from_directory(directory))


def assert_refused(directory, *fragments):
    with pytest.raises(CheckpointError) as error:
        check(directory)
    assert "\n" not in str(error.value)
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    "config, formats, census",
    [(FLASH, OFFICIAL, FLASH_CENSUS), (PRO, OFFICIAL, PRO_CENSUS), (FLASH, MODELOPT, FLASH_NVFP4_CENSUS)],
    ids=["flash", "pro", "flash-nvfp4"],
)
def test_expected_keys_have_the_published_count_and_bytes(config, formats, census):
    expected = expected_keys(ModelConfig.from_dict(config), formats)
    assert (len(expected), sum(tensor.nbytes for tensor in expected.values())) == census


@pytest.mark.parametrize("make", [tiny_config, small_ratio_config], ids=["compress_ratios", "compress_rates"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_transformers_loads_exactly_the_expected_keys(tmp_path, make, dtype):
    from transformers import DeepseekV4ForCausalLM

    write_random_checkpoint(tmp_path, make(), dtype=dtype)
    check(tmp_path)
    model, info = DeepseekV4ForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        logits = model(torch.arange(96)[None]).logits
    assert 1 < logits.float().std() < 2


@pytest.mark.parametrize("save", [write, write_shards])
def test_tensors_come_back_bit_for_bit(tmp_path, config, tensors, save):
    save(tmp_path, config, tensors)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.keys() == tensors.keys()
    for key, value in tensors.items():
        assert torch.equal(checkpoint.tensor(key), value) and checkpoint.tensor(key).dtype == value.dtype


def test_several_files_without_an_index_are_one_checkpoint(tmp_path, config, tensors):
    write_shards(tmp_path, config, tensors)
    (tmp_path / INDEX_NAME).unlink()
    assert Checkpoint(tmp_path).keys() == tensors.keys()
    assert check(tmp_path) == WeightFormats()


def test_e8m0_and_packed_codes_come_as_bytes(tmp_path):
    stored = torch.arange(-8, 8, dtype=torch.int8)
    scale = torch.arange(16, dtype=torch.uint8)
    save_file({"weight": stored, "scale": scale.view(torch.float8_e8m0fnu)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.dtype("scale") == "F8_E8M0" and checkpoint.dtype("weight") == "I8"
    assert torch.equal(checkpoint.tensor("scale"), scale)
    assert torch.equal(checkpoint.tensor("weight"), stored.view(torch.uint8))


def test_checkpoint_without_mtp_tensors_fits(tmp_path, config, tensors):
    write(tmp_path, config, {key: value for key, value in tensors.items() if not key.startswith("mtp.")})
    assert check(tmp_path) == WeightFormats()


def test_incomplete_mtp_block_is_refused(tmp_path, config, tensors):
    del tensors["mtp.0.e_proj.weight"]
    write(tmp_path, config, tensors)
    assert_refused(tmp_path, "mtp.0.e_proj.weight is missing")


def test_tensors_of_a_dspark_drafter_are_left_alone(tmp_path, config, tensors):
    write(tmp_path, config | {"dspark_block_size": 5}, tensors)
    assert check(tmp_path) == WeightFormats()


def test_missing_unused_misshaped_and_mistyped_tensors_are_in_one_error(tmp_path, config, tensors):
    del tensors["layers.1.attn.wkv.weight"]
    tensors["layers.9.attn.wkv.weight"] = torch.zeros(1)
    tensors["norm.weight"] = torch.zeros(65, dtype=torch.bfloat16)
    tensors["layers.2.attn.attn_sink"] = tensors["layers.2.attn.attn_sink"].to(torch.float16)
    write(tmp_path, config, tensors)
    assert_refused(
        tmp_path,
        "4 tensors differ",
        "layers.1.attn.wkv.weight is missing",
        "layers.9.attn.wkv.weight is not used",
        "norm.weight must be [64] BF16 or F32, is [65] BF16",
        "layers.2.attn.attn_sink must be [8] F32 or BF16, is [8] F16",
    )


def test_long_lists_are_cut_after_eight(tmp_path, config, tensors):
    write(tmp_path, config, {key: value for key, value in tensors.items() if "experts.3" not in key})
    assert_refused(tmp_path, "15 tensors differ", "; and 7 more")


def test_hash_table_with_an_unknown_expert_is_refused(tmp_path, config, tensors):
    tensors["layers.0.ffn.gate.tid2eid"][3, 1] = 8
    write(tmp_path, config, tensors)
    assert_refused(tmp_path, "layers.0.ffn.gate.tid2eid must hold expert ids 0..7, holds 0..8")


def test_int32_hash_table_fits(tmp_path, config, tensors):
    tensors["layers.0.ffn.gate.tid2eid"] = tensors["layers.0.ffn.gate.tid2eid"].int()
    write(tmp_path, config, tensors)
    check(tmp_path)


def test_one_linear_in_another_format_is_refused(tmp_path, config, tensors):
    tensors["layers.2.attn.wo_b.weight"] = tensors["layers.2.attn.wo_b.weight"].to(torch.float8_e4m3fn)
    tensors["layers.2.attn.wo_b.scale"] = torch.ones(1, 1)
    write(tmp_path, config, tensors)
    assert_refused(tmp_path, "layers.2.attn.wo_b.weight must be [64, 64] BF16 or F32, is [64, 64] F8_E4M3")


def test_keys_written_by_save_pretrained_are_explained(tmp_path, config, tensors):
    write(tmp_path, config, {f"model.{key}": value for key, value in tensors.items()})
    assert_refused(tmp_path, "use the released key names")


@pytest.mark.parametrize(
    "entry", [{"quant_method": "awq"}, {"fmt": "e5m2"}, {"weight_block_size": [64, 64]}, {"group_size": 32}]
)
def test_unknown_quantisation_is_refused(tmp_path, config, tensors, entry):
    write(tmp_path, config | {"quantization_config": entry}, tensors)
    assert_refused(tmp_path, f"quantization_config.{next(iter(entry))}", "is not supported")


def test_missing_directory_and_empty_directory_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no"):
        Checkpoint(tmp_path)


def test_missing_shard_is_named(tmp_path, config, tensors):
    write_shards(tmp_path, config, tensors)
    (tmp_path / "model-1.safetensors").unlink()
    assert_refused(tmp_path, "model-1.safetensors missing", "names 3 files")


def test_index_entry_that_its_shard_lacks_is_named(tmp_path, config, tensors):
    weight_map = write_shards(tmp_path, config, tensors)
    weight_map["norm.weight"] = "model-0.safetensors" if weight_map["norm.weight"][6] != "0" else "model-1.safetensors"
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    assert_refused(tmp_path, "lacks norm.weight")


def test_tensor_in_two_files_is_refused(tmp_path, config, tensors):
    write_shards(tmp_path, config, tensors)
    (tmp_path / INDEX_NAME).unlink()
    save_file({"norm.weight": tensors["norm.weight"]}, tmp_path / "more.safetensors")
    assert_refused(tmp_path, "norm.weight is in both", "more.safetensors")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "cannot be read"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "a appears twice"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "must be in a file of the same directory"),
    ],
)
def test_broken_index_is_named(tmp_path, config, tensors, text, message):
    write(tmp_path, config, tensors)
    (tmp_path / INDEX_NAME).write_text(text)
    assert_refused(tmp_path, INDEX_NAME, message)


def damaged(data: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "short": data[:4],
        "header only": data[: 8 + int.from_bytes(data[:8], "little")],
        "last byte lost": data[:-1],
        "header cut": data[:100],
        "header length beyond the file": (2**40).to_bytes(8, "little") + data[8:],
        "header is not JSON": data[:8] + b"?" * 64 + data[72:],
        "bytes appended": data + b"x",
        "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }


@pytest.mark.parametrize("kind", damaged(b"\0" * 100))
def test_damaged_file_is_named(tmp_path, config, tensors, kind):
    write(tmp_path, config, tensors)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damaged(path.read_bytes())[kind])
    assert_refused(tmp_path, "model.safetensors", "git-lfs pointer" if kind == "git-lfs pointer" else "copy it again")
