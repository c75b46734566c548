"""`dsv4 bench`: what it selects, says and writes. Times are made up, but for the tests that need a GPU."""

import argparse
import json
import re
import subprocess
import sys

import pytest
import torch

from benchmarks import floors, op_bench, record, timing
from benchmarks.cases import all_cases
from benchmarks.floors import H200
from benchmarks.indexer_gpu import chart
from benchmarks.result import (
    COLUMNS,
    cells,
    failure,
    headlines,
    markdown,
    peer_names,
    product_markdown,
    result,
    text_lines,
)
from benchmarks.shapes import FLASH, PRO
from benchmarks.timing import Times
from model.errors import UserError

CASES = {case.name: case for case in all_cases((FLASH, PRO))}
NEEDS_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU answers")


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dsv4")
    op_bench.add_bench(parser.add_subparsers(required=True))
    return parser.parse_args(["bench", *words])


def run(*words: str) -> None:
    arguments = parsed(*words)
    arguments.run(arguments)


def row(name: str, warm: float = 2.0, cold: float = 4.0) -> dict:
    return result(CASES[name], Times(warm, cold, 200), H200, H200)


def test_list_names_operators_and_cases_on_any_machine(capsys):
    run("--list")
    lines = capsys.readouterr().out.splitlines()
    assert "hc_post T=4096 dim 7168" in lines
    assert "linear_fp8 T=64 wo_b 4096 x 8192" in [line.removesuffix(" (reference)") for line in lines]
    assert "moe_mxfp4 T=1 Flash E 256, 6 read" in [line.removesuffix(" (reference)") for line in lines]


def test_list_takes_filter_model_and_tokens(capsys):
    run("--list", "--filter", "^quant_fp8 ", "--model", "flash", "--tokens", "2,512")
    assert capsys.readouterr().out.splitlines() == ["quant_fp8 T=2 dim 4096", "quant_fp8 T=512 dim 4096"]


def test_without_a_filter_only_operators_with_a_kernel_are_timed():
    assert not any(case.is_reference for case in op_bench.select(parsed()))
    assert len(op_bench.select(parsed("--filter", "."))) == len(CASES)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--filter", "("), r"--filter '\(' is not a regular expression"),
        (("--filter", "no such op"), "--filter 'no such op' matches no case; `dsv4 bench --list` shows them"),
        (("--tokens", "1,x"), "--tokens wants numbers from 1 to 32768, comma separated, got '1,x'"),
        (("--tokens", "0"), "--tokens wants numbers from 1 to 32768"),
        (("--tokens", "1,40000"), "--tokens wants numbers from 1 to 32768"),
        (("--output", "/no/such/folder/x.json"), "/no/such/folder is not a directory; make it first"),
        (("--output", "/tmp"), "/tmp is a directory; --output names the file to write"),
        (("indexer", "--filter", "fp8"), "dsv4 bench indexer takes --quick and --output alone"),
        (("indexer", "--output", "/tmp"), "/tmp is a directory; --output names the file to write"),
    ],
)
def test_what_a_user_can_get_wrong(words, message):
    with pytest.raises(UserError, match=message):
        run(*words)


@NEEDS_GPU
def test_without_a_gpu_one_line_says_what_is_missing():
    with pytest.raises(UserError, match=r"^dsv4 bench needs an NVIDIA GPU: torch .*; `dsv4 bench --list` shows"):
        run("--filter", "quant_fp8")


@NEEDS_GPU
def test_the_indexer_view_needs_a_gpu_too():
    with pytest.raises(UserError, match="^dsv4 bench needs an NVIDIA GPU"):
        run("indexer", "--quick")


def test_the_indexer_view_draws_ours_above_the_peers():
    common = {"form": "fp8", "batch": 1, "rows": 1, "k": 512, "peak_extra_bytes": 1 << 20}
    rows = [common | {"entries": 65536, "warm_us": 10.0, "peers": 100.0}]
    rows += [common | {"entries": 8192, "warm_us": 0.5, "peers": None}, rows[0] | {"form": "fp4", "peers": None}]
    _, head, short, long, peers, *fp4 = chart(rows)
    assert head.startswith("fp8, 1 x 1 rows, k 512")
    assert short.split() == ["8192", "keys", "0.5", "#", "1.0", "MiB"]
    assert (long.count("#"), peers.count("-"), len(fp4)) == (20, 40, 3)


def test_registering_the_command_imports_nothing_heavy():
    code = (
        "import sys, benchmarks.op_bench; print([name for name in sys.modules if name in ('torch', 'numpy', 'tqdm')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_share_is_of_the_cold_time():
    """Warm data that L2 holds never comes from memory: the share would pass 100 %."""
    found = row("q_norm_rope T=128 H 64", warm=2.0, cold=8.0)
    assert found["share"] == pytest.approx(found["floor"] / 8.0, abs=1e-3)


def test_what_is_below_a_launch_has_no_share():
    small = row("rms_norm T=1 dim 4096")
    assert (small["share"], small["bound"]) == (None, "latency")


def test_peers_target_and_ratio():
    both = row("rms_norm_quant_fp8 T=1 dim 4096", warm=1.77)
    assert both["peer"]["kernels"] == ["vllm_rms_norm", "tk_per_token_cast_fp8"]
    assert both["ratio"] == pytest.approx(1.77 / both["peer"]["warm"], abs=1e-3)
    assert row("hc_post T=4096 dim 7168")["target"] == 126.0
    alone = row("nvfp4_row_scale T=1 dim 4096")
    assert (alone["peer"], alone["ratio"], alone["target"]) == (None, None, None)


def test_kernel_that_a_peer_launches_twice_is_counted():
    moe = row("moe_fp8 T=1 Flash E 256, 6 read")
    assert peer_names(moe) == "2 x dg_grouped_fp8_masked"


def test_text_table_has_a_line_for_each_case():
    rows = [
        row("hc_post T=4096 dim 7168", warm=126.0, cold=130.0),
        row("moe_fp8 T=1 Flash E 256, 6 read") | {"runs": "reference"},
        row("sinkhorn T=1 n 4"),
    ]
    head, *lines = text_lines(rows, width=40)
    assert head.split() == ["us", *COLUMNS, "peer"]
    assert lines[0].split()[4:10] == ["126.00", "130.00", "121.81", "94%", "125.60", "1.00"]
    assert "(reference)" in lines[1] and "latency" in lines[2]


def test_columns_stay_apart_where_numbers_are_long():
    long = row("linear_fp8 T=4096 wo_b 7168 x 16384", warm=1234.5, cold=1234.5)
    assert list(text_lines([long], width=50))[1].split()[-4:-1] == ["1.62", "846.6", "cold"]


def test_case_that_fails_is_a_line_and_the_others_go_on():
    line = list(text_lines([failure(CASES["sinkhorn T=1 n 4"], RuntimeError("no kernel\nmore"))], width=20))[1]
    assert line.endswith("RuntimeError: no kernel")


def test_an_interrupt_keeps_what_was_timed(monkeypatch, capsys):
    """Minutes of measuring are not lost; the record says how many cases are missing."""
    cases = [CASES["sinkhorn T=1 n 4"], CASES["hc_post T=1 dim 7168"]]

    def one_row(cases, timer, ceilings, measured, rows):
        rows.append(row(cases[0].name))
        yield rows[-1]
        raise KeyboardInterrupt

    ceilings = floors.Ceilings(copy=1e12, read_only=1e12)
    monkeypatch.setattr(op_bench, "rows_of", one_row)
    monkeypatch.setattr(floors, "measure_ceilings", lambda time_us: ceilings)
    monkeypatch.setattr(timing, "Timer", lambda replays: None)
    monkeypatch.setattr(record, "gpu_header", lambda: {"gpu": {"name": "some GPU"}})
    found = op_bench.measure(cases, 1)
    assert (len(found["rows"]), found["cases_not_timed"]) == (1, 1)
    assert "stopped after 1 of 2 cases" in capsys.readouterr().out


def test_headlines_are_those_that_have_a_target():
    rows = [row("hc_post T=4096 dim 7168"), row("hc_post T=1 dim 7168"), row("quant_fp8 T=4096 dim 4096")]
    rows.append(failure(CASES["csa_compress_append T=1 D 512, a group ends"], RuntimeError("x")))
    assert [found["op"] for found in headlines({"rows": rows})] == ["hc_post", "quant_fp8"]
    table = markdown({"rows": rows}).splitlines()
    assert len(table) == 2 + 2 and re.match(r"\| `hc_post` \| T=4096 dim 7168 \| 2.00 \| 4.00 \|", table[2])


def test_products_are_set_against_peers_with_cold_weights():
    """Memory-bound ones by what they move, the others by what they compute; a peer may not have been measured cold."""
    rows = [
        row("linear_fp8 T=1 wo_b 4096 x 8192", warm=7.0, cold=8.925),
        row("linear_fp8 T=4096 wo_b 4096 x 8192", warm=215.0, cold=220.0),
        row("moe_nvfp4 T=1 Flash E 256, 6 read", cold=26.0),
    ]
    assert cells(rows[0])["target"] == "9 cold"
    decode, experts, prefill = product_markdown({"rows": rows}).splitlines()[2:]
    numbers = "|  |  |  | 8.9 | 3762 GB/s | 80% | 7.0 | 9 | 20.5 | `dg_fp8_gemm_nt` |"
    assert decode == f"| `linear_fp8` | T=1 wo_b 4096 x 8192 {numbers}"
    assert "|  |  |  | 220.0 | 1249 TFLOP/s | 96% | 215.0 | 236.2 | 212.6 (warm) |" in prefill
    assert experts.endswith("| 27 |  |  |")


@pytest.mark.parametrize("missing", [False, True], ids=["streamed", "record without the field"])
def test_products_show_rate_and_share_of_streamed_calls_too(missing):
    name = "linear_fp8 T=1 wo_b 4096 x 8192"
    found = result(CASES[name], Times(7.0, 15.5, 200, streamed=8.925), H200, H200)
    if missing:
        del found["streamed_us"]
    line = product_markdown({"rows": [found]}).splitlines()[2]
    streamed = "|  |  |  |" if missing else "| 8.9 | 3762 GB/s | 80% |"
    assert f"8192 {streamed} 15.5 | 2166 GB/s | 46% | 7.0 | 9 |" in line
    assert cells(found)["streamed"] == ("" if missing else "8.93")


def test_rows_are_json():
    assert json.loads(json.dumps(row("gate T=16 E 256, dim 4096")))["case"] == "T=16 E 256, dim 4096"


def test_only_a_run_over_all_cases_writes_the_result_file(monkeypatch, tmp_path, capsys):
    record = {"gpu": {"name": "NVIDIA H200"}, "rows": []}
    monkeypatch.setattr(op_bench, "check_gpu", lambda cases: None)
    monkeypatch.setattr(op_bench, "measure", lambda cases, replays: record)
    monkeypatch.setattr(op_bench, "default_output", lambda gpu: tmp_path / "default.json")
    for part in (("--quick",), ("--filter", "hc_post"), ("--model", "pro"), ("--tokens", "1")):
        run(*part)
        assert not (tmp_path / "default.json").exists()
    run("--filter", "hc_post", "--output", str(tmp_path / "part.json"))
    run()
    assert json.loads((tmp_path / "default.json").read_text()) == record
    assert json.loads((tmp_path / "part.json").read_text()) == record


def test_failed_cases_are_an_error_in_the_end(monkeypatch):
    rows = [failure(CASES["sinkhorn T=1 n 4"], RuntimeError("x"))]
    monkeypatch.setattr(op_bench, "check_gpu", lambda cases: None)
    monkeypatch.setattr(op_bench, "measure", lambda cases, replays: {"gpu": {"name": "GPU"}, "rows": rows})
    with pytest.raises(UserError, match="1 of 1 cases failed: sinkhorn T=1 n 4"):
        run("--filter", "sinkhorn T=1 n")


def test_default_result_file_is_named_after_the_gpu():
    assert op_bench.default_output("NVIDIA H100 80GB HBM3").name == "ops_h100.json"
    assert op_bench.default_output("NVIDIA H200").parent.name == "results"


@pytest.mark.cuda
def test_record_of_a_gpu(tmp_path):
    """One case of one kernel, from the command line to the file."""
    path = tmp_path / "out.json"
    run("--filter", "^quant_fp8 T=(1|4096) dim 4096", "--quick", "--output", str(path))
    record = json.loads(path.read_text())
    small, large = record["rows"]
    assert 0 < small["warm"] <= small["cold"] < large["warm"]
    assert 0.1 < large["share"] <= 1.05
    assert record["gpu"]["name"] and record["csrc_sha256"]
    assert 1e12 < record["measured_ceilings"]["copy"] < 2e13
