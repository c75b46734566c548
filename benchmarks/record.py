"""What every result file of a benchmark starts with, and how it is written."""

import datetime
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BUILTIN = Path("model/builtin")
# of `nvidia-smi --query-gpu`: what they are called in a result file
GPU_STATE = {
    "driver_version": "driver",
    "clocks.sm": "sm_clock",
    "clocks.mem": "memory_clock",
    "clocks.max.sm": "max_sm_clock",
    "clocks.max.mem": "max_memory_clock",
    "power.limit": "power_limit",
    "temperature.gpu": "temperature_celsius",
}


def header(module: str, checkpoint: Path) -> dict[str, Any]:
    """Machine, versions, date, command, and hashes of the checkpoint's files and of the sources that computed."""
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": today(),
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "checkpoint": weights(checkpoint),
        "source_sha256": sha256([*sorted(ROOT.glob("dsv4_ops/**/*.py")), *sorted(ROOT.glob("model/*.py"))]),
    }


def gpu_header() -> dict[str, Any]:
    """The current GPU and its state, versions, date, command, and the hash of the CUDA sources."""
    from dsv4_ops.build import source_hash

    properties = torch.cuda.get_device_properties()
    gpu = {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
    }
    return {
        "command": command(),
        "date": today(),
        "gpu": gpu | gpu_state(str(properties.uuid).removeprefix("GPU-")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "csrc_sha256": source_hash(),
    }


def command() -> str:
    """What was typed: a program, or `python -m` and a module."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = None if spec is None else spec.name.removesuffix(".__main__")
    program = [Path(sys.argv[0]).name] if module is None else ["python", "-m", module]
    return shlex.join([*program, *sys.argv[1:]])


def gpu_state(uuid: str) -> dict[str, str]:
    """Clocks, limits and driver of one GPU as nvidia-smi prints them; empty where it cannot be asked."""
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(GPU_STATE)}", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in printed.strip().split(",")]
    return dict(zip(GPU_STATE.values(), values, strict=True)) if len(values) == len(GPU_STATE) else {}


def today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


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
    path.write_text(as_json(record), encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)


def as_json(record: dict[str, Any]) -> str:
    """A key after the other; `rows` one a line, so that the files of two runs can be compared by eye."""
    parts = []
    for key, value in record.items():
        text = json.dumps(value, indent=2).replace("\n", "\n  ")
        if key == "rows":
            text = "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"
        parts.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
