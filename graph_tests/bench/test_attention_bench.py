"""`dsv4 bench attention`: its cases, what stands beside them, table and charts. Times are made up."""

import argparse
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks import attention_gpu, indexer_gpu, op_bench, record
from benchmarks.attention_gpu import (
    CONTEXTS,
    KINDS,
    TARGETS,
    Goal,
    chart,
    curves,
    goals,
    markdown,
    peer_us,
    sweep_goals,
)
from benchmarks.inputs import Inputs
from docs import attention_chart, readme_tables
from dsv4_ops.ops.pages import kv_page_bytes
from dsv4_ops.registry import TABLE
from model.errors import UserError

GPU = {"name": "NVIDIA H200"}
VERSIONS = {"torch": "2.11.0", "cuda": "13.0", "date": "2026-01-02", "csrc_sha256": "0123456789abcdef"}
SVG = "{http://www.w3.org/2000/svg}"


def row(goal: Goal, us: float | None = None) -> dict:
    us = 4.0 + goal.batch * goal.keys / 200 if us is None else us
    return {"name": goal.name, **asdict(goal), "warm_us": us, "cold_us": us + 2, "tflops": 1.0}


@pytest.fixture
def whole() -> dict:
    return {"gpu": GPU, "command": "dsv4 bench attention", "rows": [row(goal) for goal in goals()]} | VERSIONS


def run(*words: str) -> None:
    parser = argparse.ArgumentParser(prog="dsv4")
    op_bench.add_bench(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["bench", *words])
    arguments.run(arguments)


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_operator_takes_the_inputs_of_a_case(kind):
    goal = Goal(kind, 8, 2, k=0 if kind in ("window", "compressed") else 40, context=1024)
    out = TABLE[f"sparse_attention_{kind}"].overload(*goal.arguments(Inputs("cpu")))
    out = out[0] if isinstance(out, tuple) else out
    assert out.shape == (2, 1, 8, attention_gpu.DIM) and out.float().isfinite().all()


def test_cases_are_unique_and_have_every_target_and_every_context():
    names = [goal.name for goal in goals()]
    assert len(names) == len(set(names)) and TARGETS.keys() <= set(names)
    assert (CONTEXTS[0], CONTEXTS[-1]) == (1024, 1 << 20)
    assert len(list(sweep_goals())) == 2 * len(CONTEXTS) * len(KINDS)


def test_pools_of_every_case_leave_most_of_the_memory_free():
    """The largest: 16 sequences of 1M tokens in a CSA layer, 2.4 GB; making it takes a few times that."""
    pages = max(goal.batch * goal.context // 4 // 64 for goal in goals() if goal.kind == "selected")
    assert pages * kv_page_bytes(64, 512, 64) < 3e9


def test_peers_of_cases():
    assert peer_us(Goal("window", 64, 16)) == 11.61 and peer_us(Goal("compressed", 128, 128)) == 44.75
    assert peer_us(Goal("selected", 16, 128, k=512)) == peer_us(Goal("selected", 64, 128, k=512)) == 45.59
    assert peer_us(Goal("selected", 128, 1, rows=4096, k=1024)) == 2357.0  # the faster of two ways to call it
    assert peer_us(Goal("mixed", 64, 1, rows=4096, k=1024)) == 955.6
    assert peer_us(Goal("selected", 64, 16, rows=4, k=512)) is peer_us(Goal("window", 64, 1, context=65536)) is None


def test_table_is_of_one_context_and_prefill_has_rates():
    decode, prefill = Goal("window", 64, 1), Goal("selected", 64, 1, rows=4096, k=512)
    rows = [row(decode, 4.84), row(replace(decode, context=1024)), row(prefill, 966.0), row(Goal("window", 32, 1), 5.0)]
    assert markdown({"rows": rows}).splitlines()[2:] == [
        "| window H=64 B=1 S=1 128 of 32768 | 4.8 | 6.8 | 1 | 10.4 | 5 |",
        "| selected H=64 B=1 S=4096 128+512 of 32768 | 966.0 | 968.0 | 1 | 499 TFLOP/s | 500 TFLOP/s |",
        "| window H=32 B=1 S=1 128 of 32768 | 5.0 | 7.0 | 1 | 10.4 |  |",
    ]


def test_curves_need_two_contexts_and_leave_out_what_is_not_swept():
    far = Goal("window", 64, 1, context=65536)
    rows = [row(far), row(Goal("window", 64, 1)), row(Goal("window", 64, 16)), row(Goal("window", 64, 128))]
    found = curves(rows)
    assert list(found) == [1] and [each["context"] for each in found[1]["window"]] == [32768, 65536]
    assert curves(rows[2:]) == {} and chart(rows[2:]) == []


def test_text_chart_draws_ours_above_flashmla(whole):
    lines = chart([row(Goal("window", 64, 1), 4.0), row(Goal("window", 64, 1, context=1 << 20), 4.0)])
    assert lines[1] == "window, B=1, H=64: us, # ours, - FlashMLA, logarithmic"
    assert [line.split()[0] for line in lines[2:]] == ["32K", "10.4", "1M"]
    assert lines[3].count("-") == 40 > lines[2].count("#") == lines[4].count("#") > 0
    assert len([line for line in chart(whole["rows"]) if "logarithmic" in line]) == 2 * len(KINDS)


def test_picture_has_a_panel_a_batch_and_all_points_inside(whole):
    root = ElementTree.fromstring(attention_chart.draw(whole))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"1 sequence", "16 sequences", "1K", "1M"} <= set(texts) and texts.count("HCA") == 1 + 2
    width, height = int(root.get("width")), int(root.get("height"))
    circles = [(float(c.get("cx")), float(c.get("cy")), c.get("fill")) for c in root.iter(f"{SVG}circle")]
    assert all(0 < x < width and 0 < y < height for x, y, _ in circles)
    assert len([fill for *_, fill in circles if fill == "none"]) == 1 + 2 * len(KINDS)  # legend; FlashMLA at 32K
    assert len(circles) == len(KINDS) + 1 + 2 * len(KINDS) * (len(CONTEXTS) + 1)


def test_picture_of_a_record_with_one_batch():
    rows = [row(goal) for goal in sweep_goals() if goal.batch == 1 and goal.context != 32768]
    root = ElementTree.fromstring(attention_chart.draw({"gpu": GPU, "rows": rows}))
    assert "16 sequences" not in [text.text for text in root.iter(f"{SVG}text")]


def test_names_at_the_ends_of_lines_keep_apart():
    places = []

    class Sheet:
        def text(self, at, content, class_, anchor):
            places.append((content, at[1]))

    attention_chart.label_ends(Sheet(), 0.0, {"window": 100.0, "selected": 99.0, "compressed": 20.0})
    assert places == [("window", 104.0), ("CSA", 91.0), ("HCA", 24.0)]


def test_readme_section_shows_the_chart_if_there_is_one(monkeypatch, whole):
    index = {"gpu": GPU, "command": "dsv4 bench indexer", "rows": []} | VERSIONS
    monkeypatch.setattr(readme_tables, "measured", lambda name: whole if name == "attention_h200" else index)
    assert "](docs/attention.svg)\n\nNVIDIA H200; torch 2.11.0" in readme_tables.attention_and_index()
    whole["rows"] = [each for each in whole["rows"] if each["context"] == 32768]
    assert "attention.svg" not in readme_tables.attention_and_index()


def test_run_writes_the_record_and_draws_only_what_the_readme_shows(monkeypatch, tmp_path, capsys):
    commands, pictured = [], tmp_path / "attention_h200.json"
    monkeypatch.setattr(attention_gpu, "CHART_SOURCE", pictured)
    monkeypatch.setattr(attention_gpu, "require_kernels", lambda: None)
    monkeypatch.setattr(attention_gpu, "Timer", lambda replays: None)
    monkeypatch.setattr(attention_gpu, "measure", lambda goal, timer: row(goal))
    monkeypatch.setattr(attention_gpu, "gpu_header", lambda: {"gpu": GPU})
    monkeypatch.setattr(subprocess, "run", lambda command, cwd, check: commands.append(command[1:]))
    attention_gpu.run(7, None)
    attention_gpu.run(7, tmp_path / "other.json", "^window")
    assert commands == []
    attention_gpu.run(7, pictured)
    assert commands == [["-m", "docs.attention_chart"]]
    written = json.loads(pictured.read_text())
    assert written["replays"] == 7 and len(written["rows"]) == len(goals())
    assert len(json.loads((tmp_path / "other.json").read_text())["rows"]) == 2 * len(CONTEXTS) + 1
    printed = capsys.readouterr()
    assert "| window H=64 B=1 S=1 128 of 32768 |" in printed.out and "wrote" in printed.err


def test_pattern_that_matches_nothing_prints_an_empty_table(monkeypatch, capsys):
    monkeypatch.setattr(attention_gpu, "require_kernels", lambda: None)
    monkeypatch.setattr(attention_gpu, "Timer", lambda replays: None)
    attention_gpu.run(7, None, "no such case")
    assert len(capsys.readouterr().out.strip().splitlines()) == 2


@pytest.mark.parametrize("view, module", [("attention", attention_gpu), ("indexer", indexer_gpu)])
def test_views_write_the_file_of_this_gpu_unless_quick(monkeypatch, tmp_path, view, module):
    calls = []
    monkeypatch.setattr(op_bench, "check_gpu", lambda cases: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(module, "run", lambda replays, output: calls.append((replays, output)))
    run(view)
    run(view, "--quick")
    run(view, "--quick", "--output", str(tmp_path / "x.json"))
    assert calls == [
        (op_bench.REPLAYS, op_bench.PACKAGE / "results" / f"{view}_h100.json"),
        (op_bench.QUICK_REPLAYS, None),
        (op_bench.QUICK_REPLAYS, tmp_path / "x.json"),
    ]


@pytest.mark.parametrize("words", [("--filter", "x"), ("--list",), ("--tokens", "1"), ("--model", "pro")])
def test_the_attention_view_takes_no_selection(words):
    with pytest.raises(UserError, match="dsv4 bench attention takes --quick and --output alone"):
        run("attention", *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU answers")
def test_the_attention_view_needs_a_gpu():
    with pytest.raises(UserError, match="^dsv4 bench needs an NVIDIA GPU"):
        run("attention")


@pytest.mark.parametrize(
    "spec, words",
    [
        (None, "dsv4 bench"),
        ("model.__main__", "python -m model bench"),
        ("benchmarks.x", "python -m benchmarks.x bench"),
    ],
)
def test_record_says_what_was_typed(monkeypatch, spec, words):
    main = argparse.Namespace(__spec__=spec and argparse.Namespace(name=spec))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/dsv4", "bench"])
    assert record.command() == words


@pytest.mark.cuda
def test_a_case_on_a_gpu(tmp_path, capsys):
    path = tmp_path / "x.json"
    attention_gpu.run(3, path, "^window H=64 B=1 S=1 128 of (1024|32768)$")
    small, large = sorted(json.loads(path.read_text())["rows"], key=lambda each: each["context"])
    assert 0 < small["warm_us"] < 1000 and 0 < large["cold_us"] < 1000
    assert "window, B=1, H=64" in capsys.readouterr().out
