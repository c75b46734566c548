"""The README's sections on a GPU, and the picture of operators, from records that are made up."""

import json
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.cases import all_cases
from benchmarks.floors import H200, floor
from benchmarks.record import RESULTS, as_json
from benchmarks.result import result
from benchmarks.shapes import FLASH, PRO
from benchmarks.targets import TARGETS
from benchmarks.timing import Times
from docs import attention_chart, block_picture, op_chart, readme_tables

GPU = {"name": "NVIDIA H200", "driver": "580.1", "sm_clock": "1980 MHz"}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def record():
    """Every headline, at half again its floor or what a small kernel takes."""
    rows = []
    for case in all_cases((FLASH, PRO)):
        if case.name in TARGETS:
            us = 1.5 * floor(case.traffic, H200).us + 1.0
            rows.append(result(case, Times(us, us + 1.0, 200), H200, H200))
    versions = {"torch": "2.11.0", "cuda": "13.0", "date": "2026-01-02", "csrc_sha256": "0123456789abcdef"}
    return {"gpu": GPU, "command": "dsv4 bench", "rows": rows} | versions


def test_picture_shows_every_headline_inside_its_frame(record):
    root = ElementTree.fromstring(op_chart.draw(record))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert [row["op"] for row in record["rows"]] and all(row["op"] in texts for row in record["rows"])
    width, height = int(root.get("width")), int(root.get("height"))
    for circle in root.iter(f"{SVG}circle"):
        assert 0 < float(circle.get("cx")) < width and 0 < float(circle.get("cy")) < height
    for rect in root.iter(f"{SVG}rect"):
        assert float(rect.get("width")) > 0


def test_picture_places_times_in_order():
    axis = op_chart.Axis([0.9, 130.0])
    assert axis.ticks[0] == 0.5 and axis.ticks[-1] == 200
    places = [axis.x(us) for us in (0.0, 0.5, 1.0, 10.0, 100.0, 200.0, 1e6)]
    assert places == sorted(places) and places[0] == places[1] == op_chart.AXIS and places[-1] == op_chart.AXIS_END


def test_picture_and_section_are_left_out_before_anything_was_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(op_chart, "SOURCE", tmp_path / "none.json")
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    assert op_chart.load() is None and readme_tables.kernels() == "" and readme_tables.decode_gpu() == ""
    text = "before\n<!-- generated: kernels -->\nold\n<!-- end -->\nafter\n"
    assert readme_tables.filled(text) == "before\n<!-- generated: kernels -->\n<!-- end -->\nafter\n"


def test_section_has_the_table_the_picture_and_where_it_comes_from(monkeypatch, record):
    monkeypatch.setattr(op_chart, "load", lambda: record)
    section = readme_tables.kernels()
    assert section.startswith("## Kernels on an H200\n") and "](docs/ops.svg)" in section
    assert section.count("\n| `") == len(record["rows"])
    last = "NVIDIA H200, driver 580.1, clock 1980 MHz; torch 2.11.0, CUDA 13.0; 2026-01-02; csrc sha256 0123456789ab"
    assert section.endswith(f"{last}; `dsv4 bench`.")


def test_decode_table_names_what_takes_the_most():
    from benchmarks.decode_gpu import markdown

    operators = {f"op{number}": {"us": 1.0, "kernels": 1, "share": 0.1} for number in range(9)}
    run = {"batch": 16, "step_us": 812.4, "kernels_a_step": 240, "kernels_a_layer": 55.5, "operators": operators}
    line = markdown({"runs": [run]}).splitlines()[-1]
    assert line == "| 16 | as written | 812 | 240 | 55.5 | op0 10%, op1 10%, op2 10%, op3 10%, op4 10% |"


@pytest.mark.parametrize("script", [block_picture, op_chart, attention_chart, readme_tables], ids=lambda s: s.__name__)
def test_this_checkout_has_what_the_scripts_generate(monkeypatch, script):
    monkeypatch.setattr(sys, "argv", ["script", "--check"])
    assert script.main() == 0, f"run python -m {script.__name__}"


@pytest.mark.parametrize("name", ["decode_cpu", "evaluation_loss"])
def test_result_files_are_json_with_a_row_a_line(name):
    record = json.loads((RESULTS / f"{name}.json").read_text())
    text = as_json(record)
    assert json.loads(text) == record
    assert all(f"    {json.dumps(row)}" in text for row in record.get("rows", ()))
    assert json.loads(as_json({"rows": []})) == {"rows": []}
