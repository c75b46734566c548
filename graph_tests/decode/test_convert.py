"""`convert`: every format into every other, exactly where that is possible, and never half a checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from graph_tests.random_checkpoint import random_tensors, tiny_config, write_random_checkpoint
from model.checkpoint import Checkpoint, validate
from model.checkpoint_keys import linears
from model.config import ModelConfig
from model.convert import FORMATS, convert
from model.dequantize import dequantize_weight
from model.errors import CheckpointError

CONFIG = tiny_config(num_nextn_predict_layers=1, compress_ratios=[0, 4, 128, 4, 0])
LINEARS = [name for name, _, _ in linears(ModelConfig.from_dict(CONFIG))]
EXPERTS = [name for name in LINEARS if ".experts." in name and name.startswith("layers.")]


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fp32") / "source"
    write_random_checkpoint(directory, CONFIG, dtype=torch.float32)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "hf_quant_config.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def official(fp32):
    return run(fp32, fp32.parent / "official", "official")


def run(source, target, name, **options):
    convert(source, target, name, progress=False, **options)
    return target


def stored(directory):
    """All tensors as they are in the files."""
    return {key: value for path in directory.glob("*.safetensors") for key, value in load_file(path).items()}


def values(directory, names):
    """The fp32 values of linears, by our own reading of the directory."""
    checkpoint = Checkpoint(directory)
    formats = validate(checkpoint, ModelConfig.from_directory(directory))
    return {
        name: dequantize_weight(formats.of(name), *(checkpoint.tensor(key) for key in formats.keys(name)))
        for name in names
    }


def raw(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def same_bytes(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def left_over(directory):
    return [path for path in directory.parent.iterdir() if path.name.startswith(f".{directory.name}.")]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("first", FORMATS)
def test_every_format_becomes_every_other(fp32, tmp_path, first, name):
    """The result is valid for its own config.json and in the formats asked for; weights keep 2 bits or more."""
    source = run(fp32, tmp_path / "first", first)
    target = run(source, tmp_path / "second", name)
    formats = validate(Checkpoint(target), ModelConfig.from_directory(target))
    assert formats == FORMATS[name]
    original = values(fp32, LINEARS)
    for linear, value in values(target, LINEARS).items():
        cosine = torch.nn.functional.cosine_similarity(value.flatten(), original[linear].flatten(), dim=0)
        assert cosine > 0.98, linear


def test_official_to_fp32_is_what_transformers_dequantises(official, tmp_path):
    before, after = stored(official), stored(run(official, tmp_path / "fp32", "fp32"))
    for name in LINEARS:
        judge = Fp8Dequantize(None)._dequantize_one(before[f"{name}.weight"], before[f"{name}.scale"], torch.float32)
        assert same_bytes(after[f"{name}.weight"], judge), name


def test_official_to_bf16_loses_nothing(official, tmp_path):
    exact = values(official, LINEARS)
    for name, value in values(run(official, tmp_path / "bf16", "bf16"), LINEARS).items():
        assert torch.equal(value, exact[name]), name


def test_fp8_with_fp32_scales_is_read_and_written_with_ue8m0(tmp_path):
    """V4-Flash-Base: experts in FP8 too, scales in fp32."""
    source, tensors = tmp_path / "base", random_tensors(CONFIG)
    for name in LINEARS:
        rows, columns = tensors[f"{name}.weight"].shape
        tensors[f"{name}.weight"] = (tensors[f"{name}.weight"] * 100).to(torch.float8_e4m3fn)
        tensors[f"{name}.scale"] = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.01
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(CONFIG | {"expert_dtype": "fp8"}))
    after = stored(run(source, tmp_path / "fp32", "fp32"))
    for name in LINEARS:
        judge = Fp8Dequantize(None)._dequantize_one(tensors[f"{name}.weight"], tensors[f"{name}.scale"], torch.float32)
        assert same_bytes(after[f"{name}.weight"], judge), name
    assert stored(run(source, tmp_path / "official", "official"))[f"{LINEARS[0]}.scale"].dtype == torch.float8_e8m0fnu


def test_nvfp4_experts_hold_the_same_values_and_nothing_else_changes(official, tmp_path):
    target = run(official, tmp_path / "nvfp4", "nvfp4-experts")
    exact, cast = values(official, LINEARS), values(target, LINEARS)
    for name in LINEARS:
        assert torch.equal(cast[name].view(torch.int32), exact[name].view(torch.int32)), name
    before, after = stored(official), stored(target)
    replaced = {f"{name}.{part}" for name in EXPERTS for part in ("weight", "scale")}
    for key in before.keys() - replaced:
        assert same_bytes(before[key], after[key]), key
    new = {f"{name}.{part}" for name in EXPERTS for part in ("weight", "weight_scale", "weight_scale_2")}
    assert after.keys() == before.keys() - replaced | new
    for name in EXPERTS:
        assert after[f"{name}.weight"].dtype == torch.uint8 and after[f"{name}.weight_scale_2"].shape == ()
    gate, up = (after[f"{EXPERTS[0].removesuffix('1')}{part}.weight_scale_2"] for part in (1, 3))
    assert gate == up


def test_cast_experts_come_back_to_mxfp4_with_the_same_values(official, tmp_path):
    cast = run(official, tmp_path / "nvfp4", "nvfp4-experts")
    exact = values(official, LINEARS)
    for name, value in values(run(cast, tmp_path / "back", "official"), LINEARS).items():
        assert torch.equal(value, exact[name]), name


def test_nvfp4_replaces_every_linear_and_keeps_the_rest(official, tmp_path):
    before, after = stored(official), stored(run(official, tmp_path / "nvfp4", "nvfp4"))
    parts = {f"{name}.{part}" for name in LINEARS for part in ("weight", "weight_scale", "weight_scale_2")}
    assert parts <= after.keys() and not any(key.endswith((".scale", ".input_scale")) for key in after)
    for key in after.keys() - parts:
        assert same_bytes(before[key], after[key]), key


@pytest.mark.parametrize("name", FORMATS)
def test_same_format_is_copied_byte_for_byte(fp32, tmp_path, name):
    first = run(fp32, tmp_path / "first", name)
    again = run(first, tmp_path / "again", name)
    before, after = stored(first), stored(again)
    assert before.keys() == after.keys() and all(same_bytes(before[key], after[key]) for key in before)
    assert json.loads((first / "config.json").read_text()) == json.loads((again / "config.json").read_text())


def test_input_scales_of_modelopt_are_kept_by_nvfp4_experts_only(official, tmp_path):
    source = run(official, tmp_path / "modelopt", "nvfp4-experts")
    tensors = stored(source) | {f"{name}.input_scale": torch.tensor(0.5) for name in EXPERTS}
    save_file(tensors, source / "model.safetensors")
    assert stored(run(source, tmp_path / "copy", "nvfp4-experts")).keys() == tensors.keys()
    assert not any(key.endswith("input_scale") for key in stored(run(source, tmp_path / "all", "nvfp4")))


def wide_scales(official, directory):
    """The official checkpoint with an expert whose MXFP4 exponents span 19 powers of two."""
    tensors = stored(official)
    scale = tensors["layers.1.ffn.experts.5.w3.scale"].view(torch.uint8)
    scale[0, 0], scale[1, 0] = int(scale.max()), int(scale.max()) - 18
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text((official / "config.json").read_text())
    return directory


def test_cast_that_would_round_names_the_weights_and_writes_nothing(official, tmp_path):
    source, target = wide_scales(official, tmp_path / "wide"), tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"layers.1.ffn.experts.5.w1 and layers.1.ffn.experts.5.w3: .*requantize"):
        run(source, target, "nvfp4-experts")
    assert not target.exists() and not left_over(target)


def test_requantize_rounds_only_the_weights_that_need_it(official, tmp_path):
    source, target = wide_scales(official, tmp_path / "wide"), tmp_path / "out"
    names = ["layers.1.ffn.experts.5.w1", "layers.1.ffn.experts.5.w3"]
    assert convert(source, target, "nvfp4-experts", requantize=True, progress=False) == names
    exact = values(source, EXPERTS)
    for name, value in values(target, EXPERTS).items():
        assert torch.equal(value, exact[name]) == (name not in names), name


def test_undefined_weight_is_named(tmp_path):
    tensors = write_random_checkpoint(tmp_path / "source", CONFIG)
    tensors["layers.2.attn.wkv.weight"][3, 3] = float("nan")
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    with pytest.raises(CheckpointError, match="layers.2.attn.wkv holds infinite or undefined"):
        run(tmp_path / "source", tmp_path / "out", "official")


def test_fp32_checkpoint_has_no_other_float_type(official, tmp_path):
    types = {tensor.dtype for tensor in stored(run(official, tmp_path / "fp32", "fp32")).values()}
    assert types == {torch.float32, torch.int64}


def test_drafter_tensors_are_copied_as_they_are(official, tmp_path):
    settings = json.loads((official / "config.json").read_text()) | {"dspark_block_size": 5}
    source = tmp_path / "source"
    source.mkdir()
    save_file(stored(official), source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(settings))
    before, after = stored(official), stored(run(source, tmp_path / "out", "bf16"))
    drafter = [key for key in before if key.startswith("mtp.")]
    assert drafter and all(same_bytes(before[key], after[key]) for key in drafter)


def test_transformers_loads_what_convert_wrote(official, tmp_path):
    from transformers import DeepseekV4ForCausalLM

    target = run(official, tmp_path / "fp32", "fp32")
    _, info = DeepseekV4ForCausalLM.from_pretrained(target, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())


def test_transformers_dequantises_the_official_format_to_the_same_model(official, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import DeepseekV4ForCausalLM

    target = run(official, tmp_path / "bf16", "bf16")
    quantised, plain = (
        DeepseekV4ForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (official, target)
    )
    for (name, one), (_, two) in zip(quantised.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(one, two), name
