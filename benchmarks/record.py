"""What every result file of a benchmark starts with, and how it is written."""

import datetime
import hashlib
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BUILTIN = Path("model/builtin")


def header(module: str, checkpoint: Path) -> dict[str, Any]:
    """Machine, versions, date, command, and hashes of the checkpoint's files and of the sources that computed."""
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "checkpoint": weights(checkpoint),
        "source_sha256": sha256([*sorted(ROOT.glob("dsv4_ops/**/*.py")), *sorted(ROOT.glob("model/*.py"))]),
    }


def weights(checkpoint: Path) -> dict[str, Any]:
    """Which checkpoint it was: its path and the hash of each of its files."""
    return {
        "path": str(checkpoint),
        "sha256": {path.name: sha256([path]) for path in sorted(checkpoint.glob("*.safetensors"))},
    }


def cpu_name() -> str:
    """The model name that Linux reports, with the number of logical CPUs left to `cpus`."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def sha256(paths: list[Path]) -> str:
    """Of one file its sha256; of several the sha256 over their names and contents."""
    digest = hashlib.sha256()
    for path in paths:
        if len(paths) > 1:
            digest.update(f"{path.relative_to(ROOT)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {path}", file=sys.stderr)
