"""Loading fills every parameter or refuses the checkpoint; refitting fills them at the same addresses or not at all."""

import shutil
from dataclasses import replace

import pytest
import torch

import model.block
import model.linear
import model.moe
import model.transformer
from graph_tests.decode.stored_formats import CONFIG, FORMATS, LINEARS, stored, write, write_formats
from graph_tests.random_checkpoint import random_tensors, write_random_checkpoint
from model import CheckpointError, UserError, load, refit
from model.checkpoint_keys import expected_keys
from model.config import ModelConfig
from model.convert import convert
from model.logits import compute_logits
from model.storage import Storage
from model.weight_formats import FP8, MXFP4, WeightFormats

POISON = 0xFF  # NaN in fp32, BF16 and E4M3
TOKENS = torch.randint(CONFIG["vocab_size"], (1, 20), generator=torch.Generator().manual_seed(16))
MODES = {"default": {}, "plain activations": {"quantise_activations": False}, "exact": {"exact": True}}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return write_formats(tmp_path_factory.mktemp("loading"))


@pytest.fixture(scope="module")
def others(directories, tmp_path_factory):
    """The same formats with other weights."""
    root = tmp_path_factory.mktemp("others")
    for name in ("official", "nvfp4-experts", "nvfp4"):
        if not (root / "bf16").exists():
            write_random_checkpoint(root / "bf16", CONFIG, seed=17)
        convert(root / "bf16", root / name, name, progress=False)
    tensors = stored(directories["fp8 with fp32 scales"])
    flipped = {key: value.flip(0) if key.endswith(".attn.wq_a.weight") else value for key, value in tensors.items()}
    write(root / "fp8 with fp32 scales", flipped)
    return {name: root / name for name in FORMATS}


def make(directory, **options):
    return load(directory, max_batch=1, max_seq_len=64, **options)


def raw(tensor):
    return tensor.detach().contiguous().view(torch.uint8)


def logits_of(loaded):
    return compute_logits(loaded, TOKENS, 16)


def changed_copy(directory, target, change):
    """A copy of the checkpoint whose tensors went through `change(tensors)`."""
    tensors = stored(directory)
    change(tensors)
    return write(target, tensors)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_parameter_is_written(directories, monkeypatch, name, mode):
    """Parameters start as NaN or 0xFF, once as 0x55, too: where both leave the same bytes, the loader wrote them."""

    def poisoned(byte):
        def parameter(*shape, dtype, device):
            value = torch.empty(*shape, dtype=dtype, device=device)
            value.view(torch.uint8).fill_(byte)
            return torch.nn.Parameter(value, requires_grad=False)

        for module in (model.linear, model.moe, model.block, model.attention, model.transformer):
            monkeypatch.setattr(module, "parameter", parameter)
        return dict(make(directories[name], **MODES[mode]).named_parameters())

    first, second = poisoned(POISON), poisoned(0x55)
    assert all(torch.equal(raw(first[key]), raw(second[key])) for key in first)
    floats = {key: value for key, value in first.items() if value.dtype in (torch.float32, torch.bfloat16)}
    assert all(value.isfinite().all() for value in floats.values())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMATS)
def test_bindings_name_every_expected_tensor_once(directories, name, mode):
    loaded = make(directories[name], **MODES[mode])
    keys = [key for binding in loaded.bindings() for key in binding.keys]
    assert sorted(keys) == sorted(expected_keys(loaded.config, loaded.storage.formats))


BAD_CHECKPOINTS = {
    "missing": (lambda t: t.pop("layers.2.attn.wkv.weight"), r"layers\.2\.attn\.wkv\.weight is missing"),
    "unused": (lambda t: t.update(extra=torch.zeros(1)), "extra is not used"),
    "misshaped": (lambda t: t.update({"norm.weight": t["norm.weight"][:-1]}), r"norm\.weight must be \[256\]"),
    "wrong dtype": (lambda t: t.update({"norm.weight": t["norm.weight"].half()}), r"norm\.weight must be .*BF16"),
    "wrong class": (lambda t: t.update({"norm.weight": t["norm.weight"].long()}), r"norm\.weight must be .*I64"),
    "unknown expert": (lambda t: t["layers.0.ffn.gate.tid2eid"].fill_(6), r"tid2eid must hold expert ids 0\.\.5"),
    "part of the draft block": (lambda t: t.pop("mtp.0.enorm.weight"), r"mtp\.0\.enorm\.weight is missing"),
}


@pytest.mark.parametrize("name", ("bf16", "official", "nvfp4"))
@pytest.mark.parametrize("change, message", BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit_its_config_is_refused(directories, tmp_path, name, change, message):
    if name != "bf16" and "wkv" in message:
        message = message.replace("weight is", "(weight|scale|weight_scale) is")
    with pytest.raises(CheckpointError, match=message):
        make(changed_copy(directories[name], tmp_path / "bad", change))


@pytest.mark.parametrize("damage", ("truncated", "garbage", "empty"))
def test_a_damaged_file_is_refused(directories, tmp_path, damage):
    target = tmp_path / "bad"
    shutil.copytree(directories["bf16"], target)
    content = (target / "model.safetensors").read_bytes()
    damaged = {"truncated": content[:-100], "garbage": b"\xff" * 5000, "empty": b""}[damage]
    (target / "model.safetensors").write_bytes(damaged)
    with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
        make(target)


def test_a_checkpoint_without_the_draft_block_loads_without_one(directories, tmp_path):
    def without_mtp(tensors):
        for key in [key for key in tensors if key.startswith("mtp.")]:
            del tensors[key]

    loaded = make(changed_copy(directories["official"], tmp_path / "trunk", without_mtp))
    assert len(loaded.drafts) == 0 and loaded.config.num_nextn_predict_layers == 0
    assert torch.equal(logits_of(loaded), logits_of(make(directories["official"])))


def test_packed_caches_refuse_widths_they_cannot_hold(tmp_path):
    write_random_checkpoint(tmp_path / "odd", CONFIG | {"head_dim": 96})
    with pytest.raises(UserError, match="head_dim - qk_rope_head_dim .* got 32; use exact mode"):
        make(tmp_path / "odd")
    make(tmp_path / "odd", exact=True)


@pytest.mark.parametrize("size", ({"max_batch": 0}, {"max_seq_len": 0}, {"max_chunk": -1}, {"max_seq_len": 4097}))
def test_sizes_that_cannot_be_are_refused(directories, size):
    with pytest.raises(UserError, match="must be at least 1|longer than the model's 4096"):
        load(directories["bf16"], **size)


@pytest.mark.parametrize("progress", (False, True))
def test_progress_goes_to_stderr_if_asked_for(directories, capfd, progress):
    make(directories["official"], progress=progress)
    out, err = capfd.readouterr()
    assert out == "" and ("loading" in err) == progress
    if not progress:
        assert err == ""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMATS)
def test_refit_equals_a_fresh_load_at_the_same_addresses(directories, others, name, mode):
    loaded, fresh = make(directories[name], **MODES[mode]), make(others[name], **MODES[mode])
    addresses = {key: value.data_ptr() for key, value in (*loaded.named_parameters(), *loaded.named_buffers())}
    old, new = logits_of(loaded), logits_of(fresh)
    refit(loaded, stored(others[name]))
    assert torch.equal(logits_of(loaded), new) and not torch.equal(new, old)
    for key, value in (*loaded.named_parameters(), *loaded.named_buffers()):
        assert value.data_ptr() == addresses[key]
    same = dict(fresh.named_parameters())
    assert all(torch.equal(raw(value), raw(same[key])) for key, value in loaded.named_parameters())


def test_refit_takes_weights_in_another_precision(directories):
    """A trainer's fp32 weights go into a bf16 model, rounded once."""
    loaded, weights = make(directories["bf16"]), random_tensors(CONFIG, seed=18, dtype=torch.float32)
    refit(loaded, weights)
    given = [weights[f"layers.1.attn.{name}.weight"].bfloat16() for name in ("wq_a", "wkv")]
    assert torch.equal(loaded.blocks[1].attn.wqkv_a.products[0].weight, torch.cat(given))


def test_refit_ignores_calibrated_input_scales(directories):
    loaded, weights = make(directories["nvfp4"]), stored(directories["nvfp4"])
    refit(loaded, weights | {f"{name}.input_scale": torch.tensor(1.0) for name in LINEARS})


def replace_by(key, change):
    return lambda weights: weights | {key: change(weights[key])}


SCALE = "layers.1.attn.wq_b.scale"
BAD_WEIGHTS = {
    "missing": ("bf16", lambda w: {k: v for k, v in w.items() if k != "head.weight"}, r"head\.weight is missing"),
    "unused": ("bf16", lambda w: w | {"x.weight": w["head.weight"]}, r"x\.weight is not used"),
    "mtp missing": ("bf16", lambda w: {k: v for k, v in w.items() if k[:3] != "mtp"}, r"mtp\.0\..* is missing"),
    "shape": ("bf16", replace_by("head.weight", lambda t: t[:-1]), r"head\.weight must be \[96, 256\]"),
    "broadcast": ("bf16", replace_by("norm.weight", lambda t: t[:1]), r"norm\.weight must be \[256\]"),
    "integers": ("bf16", replace_by("norm.weight", lambda t: t.long()), r"norm\.weight must be"),
    "other format": ("official", replace_by("layers.1.attn.wq_a.weight", lambda t: t.bfloat16()), "F8_E4M3"),
    "scale shape": ("official", replace_by(SCALE, lambda t: torch.cat((t, t), 1)), r"scale must be \[4, 1\]"),
    "scale dtype": ("official", replace_by(SCALE, lambda t: t.float()), r"scale must be \[4, 1\] F8_E8M0"),
    "expert ids": ("bf16", replace_by("layers.0.ffn.gate.tid2eid", lambda t: t + 1), r"must hold expert ids 0\.\.5"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name, change, message", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_a_bad_refit_changes_nothing(directories, others, mode, name, change, message):
    loaded = make(directories[name], **MODES[mode])
    before = {key: value.clone() for key, value in loaded.named_parameters()}
    with pytest.raises(CheckpointError, match=message):
        refit(loaded, change(stored(others[name])))
    assert all(torch.equal(raw(value), raw(before[key])) for key, value in loaded.named_parameters())


def test_inputs_of_quantised_layers_are_whole_groups():
    """But for the grouped projection, whose activations stay as they are."""
    storage, columns = Storage(WeightFormats(linear=FP8, experts=MXFP4), torch.device("cpu")), 192
    needed = f"quantised layers need an input size that is a multiple of 128, got {columns}"
    with pytest.raises(CheckpointError, match=f"^blocks.0.attn.wq_a: {needed}"):
        storage.linear("blocks.0.attn.wq_a", 256, columns)
    with pytest.raises(CheckpointError, match=f"^blocks.0.ffn.experts: {needed}"):
        config = replace(ModelConfig.from_dict(CONFIG), hidden_size=columns)
        model.moe.Experts("blocks.0.ffn.experts", config, storage)
    grouped = model.linear.W8a16GroupedLinear({"blocks.0.attn.wo_a": 256}, columns, storage)
    assert grouped.weight.shape == (256, columns) and grouped.weight_scale.shape == (2, 2)
