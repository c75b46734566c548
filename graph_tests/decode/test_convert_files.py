"""The files that `convert` writes: complete under their name, or not there."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from graph_tests.random_checkpoint import tiny_config, write_random_checkpoint
from model.checkpoint import INDEX_NAME
from model.convert import convert
from model.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    write_random_checkpoint(directory, tiny_config(), dtype=torch.float32)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "hf_quant_config.json").write_text("{}")
    (directory / "consolidated.pth").write_text("weights")
    return directory


def run(source, target, name, **options):
    convert(source, target, name, progress=False, **options)
    return target


def left_over(target):
    return [path for path in target.parent.iterdir() if path.name.startswith(f".{target.name}.")]


def test_shards_stay_below_the_limit_and_are_indexed(source, tmp_path):
    target = run(source, tmp_path / "out", "bf16", shard_bytes=200_000)
    index = json.loads((target / INDEX_NAME).read_text())
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(files) > 3 and files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    sizes = [sum(tensor.nbytes for tensor in load_file(target / name).values()) for name in files]
    assert sum(sizes) == index["metadata"]["total_size"] and max(sizes) <= 200_000
    for name in files:
        assert all(index["weight_map"][key] == name for key in load_file(target / name))


def test_small_files_go_along_but_not_the_old_quantisation(source, tmp_path):
    target = run(source, tmp_path / "out", "bf16")
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_existing_target_is_refused_and_left_alone(source, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="exists and is not an empty directory"):
        run(source, tmp_path, "bf16")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    assert (run(source, tmp_path / "empty", "bf16") / "config.json").exists()


def test_full_disk_is_noticed_before_the_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="0.0 GB free"):
        run(source, tmp_path / "out", "bf16")
    assert not list(tmp_path.iterdir())


def test_target_that_cannot_be_made_is_named(source, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot write .*file/out"):
        run(source, tmp_path / "file" / "out", "bf16")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_failing_write_is_an_error_of_one_line_and_leaves_nothing(source, tmp_path, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("model.convert.save_file", fail)
    with pytest.raises(UserError, match="cannot write .*No space left"):
        run(source, tmp_path / "out", "bf16")
    assert not list(tmp_path.iterdir())


def test_unknown_format_is_refused(source, tmp_path):
    with pytest.raises(UserError, match="unknown format 'int4'"):
        run(source, tmp_path / "out", "int4")


STUCK = """
import sys, time
from model import convert
def stop(self):
    self._flush()
    print("written", flush=True)
    time.sleep(600)
convert._ShardWriter.finish = stop
convert.convert(sys.argv[1], sys.argv[2], "bf16", progress=False, shard_bytes=200_000)
"""


@pytest.fixture
def stuck_convert(source, tmp_path):
    """A process that has written all files but does not come to the end; and its target."""
    target = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", STUCK, source, target], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    yield process, target
    process.kill()
    process.communicate()


def test_killed_convert_leaves_nothing_under_the_name_and_the_next_one_cleans_up(source, stuck_convert):
    process, target = stuck_convert
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    assert len(left_over(target)) == 1 and len(list(left_over(target)[0].iterdir())) > 3
    run(source, target, "bf16")
    assert (target / "config.json").exists() and not left_over(target)


def test_second_convert_to_the_same_target_is_refused_while_the_first_runs(source, stuck_convert):
    _, target = stuck_convert
    with pytest.raises(UserError, match="is being written by another process"):
        run(source, target, "bf16")
    assert len(left_over(target)) == 1


def test_interrupted_convert_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("model.convert._copy_small_files", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", "bf16")
    assert not list(tmp_path.iterdir())


def test_progress_is_shown_on_stderr_only(source, tmp_path, capfd):
    convert(source, tmp_path / "out", "bf16", progress=True)
    shown = capfd.readouterr()
    assert shown.out == "" and "bf16" in shown.err


def test_written_files_have_the_usual_permissions(source, tmp_path):
    """safetensors makes files that only their owner may read; a converted checkpoint is for others too."""
    run(source, tmp_path / "target", "fp32")
    plain = tmp_path / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in (tmp_path / "target").iterdir()} == {plain.stat().st_mode}
