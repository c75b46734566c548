"""The command line on a tiny random checkpoint: results are transformers', mistakes are one line and exit status 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4ForCausalLM

from dsv4_ops.registry import TABLE
from graph_tests.random_checkpoint import small_ratio_config, write_random_checkpoint
from model.cli import main
from model.transformer import DeepseekV4

CONFIG = small_ratio_config(head_dim=96, hidden_size=128, q_lora_rank=128, eos_token_id=None)
VOCAB = CONFIG["vocab_size"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cli") / "checkpoint"
    write_random_checkpoint(directory, CONFIG, seed=19)
    return directory


@pytest.fixture(scope="module")
def judge(checkpoint):
    """tokens [B, T] -> transformers' fp32 logits."""
    twin = DeepseekV4ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, experts_implementation="eager").eval()

    def logits(tokens):
        with torch.no_grad():
            return twin(tokens, use_cache=False).logits

    return logits


@pytest.fixture
def tokens(tmp_path):
    tokens = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(20))
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    return tokens


@pytest.fixture
def run(capfd):
    def run(*arguments):
        """Exit status, stdout, stderr."""
        capfd.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            status = exit.code
        return status, *capfd.readouterr()

    return run


def generated(run, checkpoint, *arguments):
    status, out, err = run("generate", checkpoint, *arguments)
    assert (status, err) == (0, "")
    return out


def greedy(judge, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(judge(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_generate_greedily_what_transformers_generates(run, checkpoint, judge):
    prompt = [5, 9, 33, 2, 71, 8, 8, 40, 3]
    options = ("--temperature", 0, "--max-new-tokens", 12, "--exact", "--chunk", 4)
    out = generated(run, checkpoint, "--prompt-ids", ",".join(map(str, prompt)), *options)
    assert [int(word) for word in out.split()] == greedy(judge, prompt, 12)


def test_generate_several_prompts_each_on_its_line(run, checkpoint, judge):
    options = ("--temperature", 0, "--max-new-tokens", 8, "--exact", "--batch", 4)
    out = generated(run, checkpoint, "--prompt-ids", "7", "--prompt-ids", "1,2,3", "--prompt-ids", "90, 4", *options)
    expected = [greedy(judge, prompt, 8) for prompt in ([7], [1, 2, 3], [90, 4])]
    lines = [f"[{index}] {' '.join(map(str, row))}" for index, row in enumerate(expected)]
    assert [line.rstrip() for line in out.splitlines()] == lines


def test_generate_stops_at_the_end_of_sentence(run, checkpoint, judge, tmp_path):
    plain = greedy(judge, [7], 20)
    stop = plain[6]
    write_random_checkpoint(tmp_path / "eos", CONFIG | {"eos_token_id": [stop]}, seed=19)
    out = generated(run, tmp_path / "eos", "--prompt-ids", "7", "--temperature", 0, "--max-new-tokens", 20, "--exact")
    assert [int(word) for word in out.split()] == plain[: plain.index(stop)]


def test_generate_is_reproducible_by_its_seed(run, checkpoint):
    options = ("--prompt-ids", "7", "--max-new-tokens", 20, "--temperature", 1)
    first = generated(run, checkpoint, *options, "--seed", 5)
    assert generated(run, checkpoint, *options, "--seed", 5) == first
    assert generated(run, checkpoint, *options, "--seed", 6) != first
    assert generated(run, checkpoint, *options, "--seed", -5) != first


def test_generate_shows_each_token_before_the_next_step(checkpoint, monkeypatch, capsys):
    """The token of step n is printed when step n + 2 starts: the host reads one step behind."""
    shown, step = [], DeepseekV4.decode_step

    def watched(self):
        shown.append(len(capsys.readouterr().out.split()))
        return step(self)

    monkeypatch.setattr(DeepseekV4, "decode_step", watched)
    assert main(["generate", str(checkpoint), "--prompt-ids", "7", "--max-new-tokens", "6"]) == 0
    assert shown == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("options", ((), ("--prefill", 0), ("--prefill", 7, "--chunk", 3, "--batch", 3)))
def test_logits_are_those_of_transformers_however_they_are_read(run, checkpoint, judge, tokens, tmp_path, options):
    arguments = ("--tokens", tmp_path / "tokens.safetensors", "--out", tmp_path / "out.safetensors", "--exact")
    assert run("logits", checkpoint, *arguments, *options) == (0, "", "")
    written = load_file(tmp_path / "out.safetensors")
    assert list(written) == ["logits"] and written["logits"].dtype == torch.float32
    reference = judge(tokens)
    assert written["logits"].shape == reference.shape == (2, 20, VOCAB)
    # fp32 on both sides, sums in another order: measured below 1e-6
    assert (written["logits"] - reference).norm() / reference.norm() < 1e-5


def test_logits_take_int32_and_replace_an_old_file(run, checkpoint, tokens, tmp_path):
    source, target = tmp_path / "tokens.safetensors", tmp_path / "out.safetensors"
    assert run("logits", checkpoint, "--tokens", source, "--out", target)[0] == 0
    wide = target.read_bytes()
    save_file({"tokens": tokens.int()}, source)
    target.write_bytes(b"old")
    assert run("logits", checkpoint, "--tokens", source, "--out", target) == (0, "", "")
    assert target.read_bytes() == wide
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "tokens.safetensors"]


@pytest.mark.parametrize("name", ("fp32", "bf16"))
def test_convert_keeps_what_the_model_computes(run, checkpoint, tokens, tmp_path, name):
    """bf16 weights are exact in both."""
    outputs = []
    assert run("convert", checkpoint, tmp_path / "new", "--format", name) == (0, "", "")
    for source in (checkpoint, tmp_path / "new"):
        out = tmp_path / "out.safetensors"
        arguments = ("--tokens", tmp_path / "tokens.safetensors", "--out", out, "--exact")
        assert run("logits", source, *arguments)[0] == 0
        outputs.append(load_file(out)["logits"])
    assert torch.equal(*outputs)


def test_info_names_every_operator(run):
    status, out, err = run("info")
    assert (status, err) == (0, "")
    words = out.replace(",", " ").split()
    assert all(words.count(name) == 1 for name in TABLE)
    assert f"torch         {torch.__version__}" in out


@pytest.mark.parametrize("command", ((), ("generate",), ("logits",), ("convert",), ("build",), ("bench",), ("info",)))
def test_help_describes_every_option(run, command):
    status, out, err = run(*command, "--help")
    assert (status, err) == (0, "") and out.startswith("usage: dsv4") and "-h, --help" in out


def python_m_model(*arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "model", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **options)


def test_python_m_model_is_the_command(checkpoint, run, tmp_path):
    options = ("--prompt-ids", "7", "--max-new-tokens", 5, "--seed", 3)
    done = python_m_model("generate", checkpoint, *options, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == generated(run, checkpoint, *options)


def test_python_m_model_reports_mistakes_in_one_line(tmp_path):
    done = python_m_model("generate", tmp_path, "--prompt-ids", "7", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"dsv4: error: {tmp_path}/config.json is missing; a checkpoint directory needs config.json and *.safetensors\n"
    )


@pytest.mark.parametrize("buffered", (True, False))
def test_a_reader_that_goes_away_is_no_traceback(buffered):
    """`dsv4 info | head -1`, with a reader that is gone before anything is written."""
    command = f"{sys.executable} -m model info | true; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "" if buffered else "1"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_tokenizer_that_is_none_is_refused(run, tmp_path):
    write_random_checkpoint(tmp_path / "new", CONFIG)
    (tmp_path / "new" / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    status, out, err = run("generate", tmp_path / "new", "--prompt", "hello")
    assert (status, out) == (2, "") and err.count("\n") == 1 and "is not a tokenizer" in err
