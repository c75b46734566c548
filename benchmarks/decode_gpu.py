"""One decode step of four V4-Flash layers on a GPU: how long a replay of its graph takes, and what it spends that on.

The model has the real widths and formats (FP8 linears, MXFP4 experts, all 256 of them), random weights, and one layer
of each kind with CSA twice. Every sequence has read `context` tokens. Three things are recorded for each batch:

  step        median time of a replay, by events on the stream, and how many kernels a replay runs
  operators   GPU time of each operator in a step that is called directly, and of what runs between operators
  kernels     GPU time of each kernel of the graph, by its name
"""

import argparse
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.kernel_trace import count_kernels, launches, outermost, shares_of_families, shares_of_operators, trace
from benchmarks.random_model import LAYERS, random_model, rewind, seat
from benchmarks.record import RESULTS, gpu_header, write
from benchmarks.shapes import FLASH
from dsv4_ops.kernels import require_kernels
from model.decoding import capture_decode
from model.transformer import DeepseekV4

BLOCK = "block"  # the range around each block in a trace
TRACED_STEPS = 5
WARM_UP_STEPS = 3
LARGEST = 5  # operators that the README names


def kernels_outside_blocks(model: DeepseekV4, step: Callable[[], object]) -> int:
    """Kernels of embedding, head and sampling in a step that is called directly."""
    with ExitStack() as hooks:
        for block in model.blocks:
            ranges: list = []

            def enter(*_, ranges=ranges) -> None:
                ranges.append(torch.profiler.record_function(BLOCK))
                ranges[-1].__enter__()

            def leave(*_, ranges=ranges) -> None:
                ranges.pop().__exit__(None, None, None)

            hooks.callback(block.register_forward_pre_hook(enter).remove)
            hooks.callback(block.register_forward_hook(leave).remove)
        events, _ = trace(step, 1)
    everything = [launch.name for event in events if event.cpu_parent is None for launch in launches(event)]
    of_blocks = [launch.name for event in outermost(events, BLOCK) for launch in launches(event)]
    return count_kernels(everything) - count_kernels(of_blocks)


def replay_times(step: Callable[[], object], steps: int) -> list[float]:
    """us of each of `steps` steps, enqueued one behind the other."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in zip(events[:-1], events[1:], strict=True)]


@torch.no_grad()
def measure(model: DeepseekV4, batch: int, context: int, steps: int, outside: int) -> dict[str, Any]:
    """What one batch takes. Positions go back to `context` before each of the measurements."""
    seat(model, batch, context, max(steps, TRACED_STEPS) + WARM_UP_STEPS)
    for _ in range(WARM_UP_STEPS):
        model.decode_step()
    rewind(model, context)
    events, _ = trace(model.decode_step, TRACED_STEPS)
    rewind(model, context)
    graph = capture_decode(model, (batch,))
    replay_times(lambda: graph.step(batch), WARM_UP_STEPS)
    rewind(model, context)
    times = replay_times(lambda: graph.step(batch), steps)
    rewind(model, context)
    _, kernels = trace(lambda: graph.step(batch), TRACED_STEPS)
    count = round(count_kernels(name for name, _ in kernels) / TRACED_STEPS)
    return {
        "batch": batch,
        "step_us": round(statistics.median(times), 1),
        "step_us_tenths": [round(value, 1) for value in statistics.quantiles(times, n=10)],
        "kernels_a_step": count,
        "kernels_a_layer": round((count - outside) / len(LAYERS), 1),
        "operators": table(shares_of_operators(events, TRACED_STEPS)),
        "kernels": table(shares_of_families(kernels, TRACED_STEPS)),
    }


def table(shares: dict) -> dict[str, dict]:
    total = sum(share.us for share in shares.values())
    return {
        name: asdict(share) | {"us": round(share.us, 2), "share": round(share.us / total, 4)}
        for name, share in shares.items()
    }


def print_run(run: dict[str, Any], layers: int) -> None:
    print(f"batch {run['batch']}: {run['step_us']:.1f} us a step of {layers} layers, ", end="")
    print(f"{run['kernels_a_step']} kernels, {run['kernels_a_layer']:g} a layer")
    for name, share in run["operators"].items():
        print(f"  {share['share']:6.1%} {share['us']:10.1f} us {share['kernels']:5} kernels  {name}")


def markdown(record: dict[str, Any]) -> str:
    """The README's table: a line for each batch, with the operators that take the most."""
    lines = [
        "| batch | µs a step | kernels a step | kernels a layer | operators that take the most |",
        "|--:|--:|--:|--:|---|",
    ]
    for run in record["runs"]:
        most = list(run["operators"].items())[:LARGEST]
        names = ", ".join(f"{name} {share['share']:.0%}" for name, share in most)
        counts = f"{run['kernels_a_step']} | {run['kernels_a_layer']:g}"
        lines.append(f"| {run['batch']} | {run['step_us']:.0f} | {counts} | {names} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64], metavar="B", help="default 1 16 64")
    parser.add_argument("--context", type=int, default=8192, metavar="N", help="tokens read before (default 8192)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="timed steps (default 50)")
    parser.add_argument("--compile", action="store_true", help="compile each kind of block first (backend dsv4)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="default benchmarks/results/decode_flash4_GPU.json"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a GPU is needed, and torch sees none")
    return arguments


def main() -> None:
    arguments = parse()
    require_kernels()
    model = random_model(FLASH, "cuda")
    seat(model, 1, arguments.context, WARM_UP_STEPS + 1)
    for _ in range(WARM_UP_STEPS):
        model.decode_step()
    outside = kernels_outside_blocks(model, model.decode_step)
    if arguments.compile:
        model.compile()
    record = gpu_header() | {
        "layers": [kind for kind, _ in LAYERS],
        "weights": "random; FP8 linears, MXFP4 experts",
        "context": arguments.context,
        "steps": arguments.steps,
        "compiled": arguments.compile,
        "kernels_outside_blocks": outside,
        "runs": [],
    }
    for batch in tqdm(arguments.batch, unit="batch", leave=False):
        record["runs"].append(measure(model, batch, arguments.context, arguments.steps, outside))
        print_run(record["runs"][-1], len(LAYERS))
        torch.cuda.empty_cache()
    gpu = record["gpu"]["name"].lower().removeprefix("nvidia ").split()[0]
    write(arguments.out or RESULTS / f"decode_flash4_{gpu}.json", record)


if __name__ == "__main__":
    main()
