"""What a user can get wrong: each mistake is one line on stderr, exit status 2, and nothing written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from graph_tests.random_checkpoint import small_ratio_config, write_random_checkpoint
from model.cli import main

CONFIG = small_ratio_config(head_dim=96, hidden_size=128, q_lora_rank=128)
VOCAB = CONFIG["vocab_size"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cli") / "checkpoint"
    write_random_checkpoint(directory, CONFIG, seed=21)
    return directory


@pytest.fixture
def refused(tmp_path, capfd, monkeypatch):
    """Runs a command that must fail; returns its one line of stderr. {here} is a directory that must not change."""
    monkeypatch.chdir(tmp_path)

    def refused(command, *arguments, usage=False):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        capfd.readouterr()
        try:
            status = main([command, *map(str, arguments)])
        except SystemExit as exit:
            status = exit.code
        out, err = capfd.readouterr()
        assert (status, out) == (2, "") and "Traceback" not in err and err.endswith("\n")
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        assert err.startswith("usage:" if usage else "dsv4: error: ")
        lines = err.splitlines()
        assert usage or len(lines) == 1
        return lines[-1]

    return refused


def tensors_of(directory):
    return load_file(directory / "model.safetensors")


def damaged_copy(checkpoint, target, damage):
    """A copy with `damage(tensors)` done to its weights."""
    tensors = tensors_of(checkpoint)
    damage(tensors)
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    shutil.copy(checkpoint / "config.json", target)
    return target


def configured_copy(checkpoint, target, **changes):
    target.mkdir()
    (target / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    (target / "config.json").write_text(json.dumps(CONFIG | changes))
    return target


def every_command(refused, checkpoint, tmp_path):
    """The last line of each command that reads a checkpoint."""
    save_file({"tokens": torch.zeros(1, 4, dtype=torch.int64)}, tmp_path / "tokens.safetensors")
    yield refused("generate", checkpoint, "--prompt-ids", "1")
    yield refused("logits", checkpoint, "--tokens", "tokens.safetensors", "--out", "out.safetensors")
    yield refused("convert", checkpoint, "new", "--format", "bf16")


DAMAGES = {
    "missing": (lambda t: t.pop("norm.weight"), "norm.weight is missing"),
    "unused": (lambda t: t.update(extra=torch.zeros(1)), "extra is not used"),
    "misshaped": (lambda t: t.update({"norm.weight": t["norm.weight"][1:]}), "norm.weight must be [128]"),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_tensors_that_do_not_fit(refused, checkpoint, tmp_path, damage, message):
    bad = damaged_copy(checkpoint, tmp_path / "bad", damage)
    assert all(message in line for line in every_command(refused, bad, tmp_path))


@pytest.mark.parametrize("size", (0, 7, 1000, -1))
def test_truncated_file(refused, checkpoint, tmp_path, size):
    bad = damaged_copy(checkpoint, tmp_path / "bad", lambda tensors: None)
    content = (bad / "model.safetensors").read_bytes()
    (bad / "model.safetensors").write_bytes(content[:size])
    assert all("model.safetensors is truncated" in line for line in every_command(refused, bad, tmp_path))


@pytest.mark.parametrize("header", (b"{not json", b'{"norm.weight": 3}', b"\xff\xfe\x00"))
def test_corrupt_header(refused, checkpoint, tmp_path, header):
    bad = damaged_copy(checkpoint, tmp_path / "bad", lambda tensors: None)
    (bad / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert all("no safetensors file" in line for line in every_command(refused, bad, tmp_path))


CONFIGS = {
    "model type": ({"model_type": "llama"}, "model_type 'llama' is not supported"),
    "quantisation": ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq' is not supported"),
    "scale format": ({"quantization_config": {"quant_method": "fp8", "scale_fmt": "x"}}, "scale_fmt 'x'"),
    "other shape": ({"hidden_size": 64}, "from what config.json asks for"),
    "type": ({"num_hidden_layers": "four"}, "num_hidden_layers must be an integer"),
    "negative": ({"sliding_window": -8}, "sliding_window must be an integer >= 1, got -8"),
}


@pytest.mark.parametrize("changes, message", CONFIGS.values(), ids=CONFIGS)
def test_config_that_is_not_supported(refused, checkpoint, tmp_path, changes, message):
    bad = configured_copy(checkpoint, tmp_path / "bad", **changes)
    assert all(message in line for line in every_command(refused, bad, tmp_path))


@pytest.mark.parametrize("content", ("", "{", "[]", "\x00"))
def test_config_that_is_no_json_object(refused, checkpoint, tmp_path, content):
    bad = configured_copy(checkpoint, tmp_path / "bad")
    (bad / "config.json").write_text(content)
    assert all("config.json" in line for line in every_command(refused, bad, tmp_path))


def test_checkpoint_that_is_not_there(refused, tmp_path):
    assert all("/nonexistent is not a directory" in line for line in every_command(refused, "/nonexistent", tmp_path))


def test_checkpoint_with_a_name_that_is_too_long(refused, tmp_path):
    assert all("File name too long: 'xxx" in line for line in every_command(refused, "x" * 300, tmp_path))


GENERATE = {
    "no prompt": ((), "no prompt was given"),
    "empty prompt": (("--prompt-ids", ""), "prompt 0 has no token"),
    "not a number": (("--prompt-ids", "1,two"), "--prompt-ids wants comma-separated integers, got '1,two'"),
    "token too large": (("--prompt-ids", f"1,{VOCAB}"), f"prompt 0: token {VOCAB} is out of range"),
    "huge token": (("--prompt-ids", 10**30), "is out of range"),
    "negative token": (("--prompt-ids", -1), "prompt 0: token -1 is out of range"),
    "text without tokenizer": (("--prompt", "hello"), "tokenizer.json is missing; give token ids"),
    "too long": (("--prompt-ids", "1,2,3", "--max-seq-len", 10), "needs 67 positions, the state has 10"),
    "longer than the model": (("--prompt-ids", "1", "--max-new-tokens", 4096), "longer than the model's 4096"),
    "too many prompts": (("--prompt-ids", "1", "--prompt-ids", "2", "--batch", 1), "2 prompts do not fit"),
    "batch 0": (("--prompt-ids", "1", "--batch", 0), "1 prompts do not fit into a state of 0"),
    "negative batch": (("--prompt-ids", "1", "--batch", -3), "1 prompts do not fit into a state of -3"),
    "length 0": (("--prompt-ids", "1", "--max-seq-len", 0), "the state has 0"),
    "negative length": (("--prompt-ids", "1", "--max-seq-len", -9), "the state has -9"),
    "no new token": (("--prompt-ids", "1", "--max-new-tokens", 0), "--max-new-tokens must be at least 1"),
    "negative tokens": (("--prompt-ids", "1", "--max-new-tokens", -7), "--max-new-tokens must be at least 1, got -7"),
    "chunk 0": (("--prompt-ids", "1", "--chunk", 0), "must be at least 1"),
    "negative chunk": (("--prompt-ids", "1", "--chunk", -4), "must be at least 1"),
    "negative temperature": (("--prompt-ids", "1", "--temperature", -1), "temperature must be >= 0, got -1.0"),
    "no temperature": (("--prompt-ids", "1", "--temperature", "nan"), "temperature must be >= 0, got nan"),
    "negative top-k": (("--prompt-ids", "1", "--top-k", -1), "top_k must be"),
    "top-p 0": (("--prompt-ids", "1", "--top-p", 0), "top_p must be above 0 and at most 1, got 0.0"),
    "top-p 2": (("--prompt-ids", "1", "--top-p", 2), "top_p must be above 0 and at most 1, got 2.0"),
    "huge seed": (("--prompt-ids", "1", "--seed", 2**63), "seed must fit into 62 bits"),
    "unknown device": (("--prompt-ids", "1", "--device", "foo"), "unknown device 'foo'; use cpu, cuda or cuda:N"),
    "other device": (("--prompt-ids", "1", "--device", "meta"), "device meta is not supported"),
    "no such GPU": (("--prompt-ids", "1", "--device", "cuda:97"), "device cuda:97 is not there"),
}


@pytest.mark.parametrize("arguments, message", GENERATE.values(), ids=GENERATE)
def test_generate_refuses(refused, checkpoint, arguments, message):
    assert message in refused("generate", checkpoint, *arguments)


def test_a_gpu_without_a_gpu(refused, checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "device cuda is not there" in refused("generate", checkpoint, "--prompt-ids", "1", "--device", "cuda")


LOGITS = {
    "prefill too long": (("--prefill", 5), "--prefill must be between 0 and the 4 positions of the tokens, got 5"),
    "negative prefill": (("--prefill", -1), "--prefill must be between 0 and the 4 positions of the tokens, got -1"),
    "batch too small": (("--batch", 1), "tokens [2, 4] do not fit into a state of 1 sequences of 4 positions"),
    "negative batch": (("--batch", -1), "do not fit into a state of -1 sequences"),
    "state too short": (("--max-seq-len", 3), "do not fit into a state of 2 sequences of 3 positions"),
    "negative chunk": (("--chunk", -1), "must be at least 1"),
    "no such directory": (("--out", "none/out.safetensors"), "none is not a directory; make it first"),
    "directory": (("--out", "."), "is a directory; --out names the file to write"),
    "long name": (("--out", "x" * 300), "File name too long: 'xxx"),
    "long name of the temporary file": (("--out", "x" * 250), "cannot be written"),
    "unknown device": (("--device", "cuda:x"), "unknown device 'cuda:x'"),
}


@pytest.mark.parametrize("arguments, message", LOGITS.values(), ids=LOGITS)
def test_logits_refuse(refused, checkpoint, tmp_path, arguments, message):
    save_file({"tokens": torch.zeros(2, 4, dtype=torch.int64)}, tmp_path / "in.safetensors")
    out = () if "--out" in arguments else ("--out", "out.safetensors")
    assert message in refused("logits", checkpoint, "--tokens", "in.safetensors", *out, *arguments)


TOKEN_FILES = {
    "other name": ({"ids": torch.zeros(1, 4, dtype=torch.int64)}, "must hold a tensor `tokens`, holds ids"),
    "no tensor": ({}, "must hold a tensor `tokens`, holds nothing"),
    "floats": ({"tokens": torch.zeros(1, 4)}, "tokens must be int64 [B, T]"),
    "bytes": ({"tokens": torch.zeros(1, 4, dtype=torch.uint8)}, "tokens must be int64 [B, T]"),
    "flat": ({"tokens": torch.zeros(4, dtype=torch.int64)}, "tokens must be int64 [B, T]"),
    "empty": ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, "with B, T >= 1"),
    "too large": ({"tokens": torch.tensor([[0, VOCAB]])}, f"token {VOCAB} is out of range"),
    "negative": ({"tokens": torch.tensor([[0, -1]])}, "token -1 is out of range"),
    "longer than the model": ({"tokens": torch.zeros(1, 4097, dtype=torch.int64)}, "longer than the model's 4096"),
}


@pytest.mark.parametrize("tensors, message", TOKEN_FILES.values(), ids=TOKEN_FILES)
def test_token_file_that_does_not_fit(refused, checkpoint, tmp_path, tensors, message):
    save_file(tensors, tmp_path / "in.safetensors")
    assert message in refused("logits", checkpoint, "--tokens", "in.safetensors", "--out", "out.safetensors")


@pytest.mark.parametrize("content", (None, b"", b"\x00" * 100, b"[[1, 2]]"))
def test_token_file_that_cannot_be_read(refused, checkpoint, tmp_path, content):
    if content is not None:
        (tmp_path / "in.safetensors").write_bytes(content)
    line = refused("logits", checkpoint, "--tokens", "in.safetensors", "--out", "out.safetensors")
    assert "in.safetensors cannot be read" in line


def test_convert_refuses_a_target_that_exists(refused, checkpoint, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    for target in ("mine", "mine/file"):
        assert "exists and is not an empty directory" in refused("convert", checkpoint, target, "--format", "bf16")


def test_convert_refuses_weights_that_are_not_finite(refused, checkpoint, tmp_path):
    bad = damaged_copy(checkpoint, tmp_path / "bad", lambda t: t["layers.1.attn.wq_a.weight"].fill_(float("inf")))
    line = refused("convert", bad, "new", "--format", "official")
    assert "layers.1.attn.wq_a holds infinite or undefined weights" in line


@pytest.mark.parametrize(
    "arguments, message",
    (
        (("convert", "a", "b", "--format", "int4"), "invalid choice: 'int4'"),
        (("convert", "a"), "the following arguments are required: target, --format"),
        (("generate", "a", "--max-new-tokens", "many"), "invalid int value: 'many'"),
        (("generate", "a", "--prompt-ids"), "expected one argument"),
        (("generate", "a", "--prompts", "x", "--nope"), "unrecognized arguments"),
        (("logits", "a"), "the following arguments are required: --tokens, --out"),
        (("train",), "invalid choice: 'train'"),
    ),
)
def test_options_that_cannot_be_parsed(refused, arguments, message):
    assert message in refused(*arguments, usage=True)
