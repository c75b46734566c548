"""The GPU test command: `python -m graph_tests.cuda.run`.

Builds the kernels for the visible GPU, runs every test marked `cuda`, then the small cases marked `sanitize` under
compute-sanitizer's memcheck and racecheck, and writes graph_tests/cuda/receipt.json: which sources passed, where, when.
CI, which has no GPU, compares the receipt's hash with the sources. A run that fails writes no receipt.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RECEIPT = Path(__file__).with_name("receipt.json")
ROOT = Path(__file__).parents[2]
# What each checks; racecheck sees hazards in kernels of cuBLAS.
SANITIZERS = {"memcheck": "sanitize", "racecheck": "sanitize and not library"}
SANITIZER_FAILED = 99
MOST_WORKERS = 12  # each holds a CUDA context


def in_parallel() -> list[str]:
    """Options that spread tests over processes where pytest-xdist is installed: the CPU references take the time."""
    workers = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    return ["-n", str(workers)] if importlib.util.find_spec("xdist") and workers > 1 else []


def run_tests(arguments: list[str], prefix: list[str] = (), **environment: str) -> dict[str, int]:
    """Run pytest in a process of its own; its counts of passed, failed and skipped tests and its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [*prefix, sys.executable, "-m", "pytest", f"--junitxml={report}", *arguments]
        status = subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode
        suite = ElementTree.parse(report).getroot().find("testsuite") if report.exists() else None
    if suite is None:
        return {"status": status or 1, "passed": 0, "failed": 0, "skipped": 0}
    count = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    return {"status": status, "passed": passed, "failed": failed, "skipped": count["skipped"]}


def sanitize(tool: str) -> dict[str, int]:
    """The small cases under one of compute-sanitizer's tools; an error that it finds is a failed run."""
    prefix = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(SANITIZER_FAILED)]
    return run_tests(["-q", "-m", SANITIZERS[tool], "graph_tests/cuda"], prefix, OMP_NUM_THREADS="1")


def machine() -> dict[str, str]:
    """GPU, driver and versions."""
    import torch

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.split("\n")[0]
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpus": str(torch.cuda.device_count()),
        "driver": driver,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RECEIPT, help="where the receipt goes")
    parser.add_argument("--no-sanitizer", action="store_true", help="leave out compute-sanitizer; writes no receipt")
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest; with any of them no receipt is written")
    options = parser.parse_args()

    from dsv4_ops.build import build, source_hash

    start = time.monotonic()
    build()
    tools = () if options.no_sanitizer or options.pytest else SANITIZERS
    with ThreadPoolExecutor() as side_by_side:
        sanitizers = {tool: side_by_side.submit(sanitize, tool) for tool in tools}
        tests = run_tests([*in_parallel(), "-m", "cuda", "graph_tests/cuda", *options.pytest], OMP_NUM_THREADS="1")
        sanitizer = {tool: run.result() for tool, run in sanitizers.items()}
    passed = all(run["status"] == 0 for run in (tests, *sanitizer.values()))
    if options.pytest or options.no_sanitizer or not passed:
        print(f"no receipt: {'failed' if not passed else 'not everything was run'} ({tests}, {sanitizer})")
        return 0 if passed else 1
    receipt = {
        "source_hash": source_hash(),
        **machine(),
        "date": datetime.date.today().isoformat(),
        "command": "python -m graph_tests.cuda.run",
        "tests": tests,
        "compute-sanitizer": sanitizer,
        "seconds": round(time.monotonic() - start),
    }
    text = json.dumps(receipt, indent=2)
    options.output.write_text(text + "\n")
    print(f"{text}\nwrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
