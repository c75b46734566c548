"""One decode step of V4-Flash layers on a GPU: how long a replay of its graph takes, and what it spends that on.

The model has the real widths and formats (FP8 linears, MXFP4 experts, all 256 of them unless --experts says otherwise)
and random weights. By default it is four layers, one of each kind with CSA twice; --layers 43 is the whole model, which
with 224 of the 256 experts fits one H200. Every sequence has read `context` tokens. Recorded for each batch:

  step        median time of a replay, by events on the stream, and how many kernels a replay runs
  floor       what a step must read (benchmarks/step_bytes.py) at the speed of reading
  operators   GPU time of each operator in a step that is called directly, and of what runs between operators
  kernels     GPU time of each kernel of the graph, by its name
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.floors import H200
from benchmarks.kernel_trace import count_kernels, launches, outermost, shares_of_families, shares_of_operators, trace
from benchmarks.peers import layer_us
from benchmarks.random_model import FLASH_LAYERS, LAYERS, Layers, random_model, rewind, seat
from benchmarks.record import RESULTS, gpu_header, write
from benchmarks.shapes import FLASH
from benchmarks.step_bytes import step_bytes
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
    count, us = round(count_kernels(name for name, _ in kernels) / TRACED_STEPS), statistics.median(times)
    least = step_bytes(model, batch, context)
    return {
        "batch": batch,
        "step_us": round(us, 1),
        "step_us_tenths": [round(value, 1) for value in statistics.quantiles(times, n=10)],
        "tokens_a_second": round(1e6 * batch / us, 1),
        "bytes_a_step": least,
        "gb_a_second": round(least / us / 1e3, 1),
        "floor_us": round(1e6 * least / H200.read_only, 1),
        "kernels_a_step": count,
        "kernels_a_layer": round((count - outside) / len(model.blocks), 1),
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
    step = f"{run['step_us']:.1f} us a step of {layers} layers, blocks {blocks(run)}, {run['kernels_a_step']} kernels, "
    print(f"batch {run['batch']}: {step}")
    print(f"  {run['kernels_a_layer']:g} a layer; {run['tokens_a_second']:g} tokens/s, {run['gb_a_second']:.0f} GB/s, ")
    print(f"  the floor is {run['floor_us']:.1f} us: {run['floor_us'] / run['step_us']:.1%}")
    for name, share in run["operators"].items():
        print(f"  {share['share']:6.1%} {share['us']:10.1f} us {share['kernels']:5} kernels  {name}")


def blocks(run: dict[str, Any]) -> str:
    """How the blocks of the graph run: operators one by one, or compiled, with what lies between operators fused."""
    return "compiled" if run.get("compiled") else "as written"


def markdown(record: dict[str, Any]) -> str:
    """The README's table: a line for each batch, with the operators that take the most."""
    lines = [
        "| batch | blocks | µs a step | kernels a step | kernels a layer | operators that take the most |",
        "|--:|---|--:|--:|--:|---|",
    ]
    for run in record["runs"]:
        most = list(run["operators"].items())[:LARGEST]
        names = ", ".join(f"{name} {share['share']:.0%}" for name, share in most)
        counts = f"{run['kernels_a_step']} | {run['kernels_a_layer']:g}"
        lines.append(f"| {run['batch']} | {blocks(run)} | {run['step_us']:.0f} | {counts} | {names} |")
    return "\n".join(lines)


def whole_markdown(record: dict[str, Any]) -> str:
    """The README's table of a whole model: a line for each batch, with transformers' time for the same layers."""
    lines = [
        "| batch | blocks | µs a step | tokens/s | GB/s | share of the floor | kernels a layer "
        "| transformers, µs a step | operators that take the most |",
        "|--:|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for run in record["runs"]:
        most = list(run["operators"].items())[:LARGEST]
        names = ", ".join(f"{name} {share['share']:.0%}" for name, share in most)
        layers = [layer_us(kind, run["batch"]) for kind in record["layers"]]
        theirs = "" if None in layers else f"{sum(layers):.0f}"
        share = f"{run['floor_us'] / run['step_us']:.0%}"
        numbers = f"{run['step_us']:.0f} | {run['tokens_a_second']:.0f} | {run['gb_a_second']:.0f} | {share}"
        first = f"| {run['batch']} | {blocks(run)} | {numbers}"
        lines.append(f"{first} | {run['kernels_a_layer']:g} | {theirs} | {names} |")
    return "\n".join(lines)


def layers_of(count: int) -> Layers:
    """Four layers are one of each kind and CSA twice; more or fewer are the first of the released model."""
    return LAYERS if count == len(LAYERS) else FLASH_LAYERS[:count]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64], metavar="B", help="default 1 16 64")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="default 4, the whole model has 43")
    parser.add_argument("--experts", type=int, default=256, metavar="E", help="routed experts a layer (default 256)")
    parser.add_argument("--context", type=int, default=8192, metavar="N", help="tokens read before (default 8192)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="timed steps (default 50)")
    parser.add_argument(
        "--compile", action="store_true", help="then once more with each kind of block compiled (backend dsv4)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="default benchmarks/results/decode_flashN_GPU.json"
    )
    arguments = parser.parse_args()
    most, least = len(FLASH_LAYERS), FLASH.num_experts_per_tok
    if not 1 <= arguments.layers <= most or not least <= arguments.experts <= FLASH.n_routed_experts:
        parser.error(f"1 to {most} layers and {least} to {FLASH.n_routed_experts} experts")
    if not torch.cuda.is_available():
        parser.error("a GPU is needed, and torch sees none")
    return arguments


def main() -> None:
    arguments = parse()
    require_kernels()
    start, layers = time.perf_counter(), layers_of(arguments.layers)
    model = random_model(replace(FLASH, n_routed_experts=arguments.experts), "cuda", layers)
    torch.cuda.synchronize()
    print(f"{torch.cuda.memory_allocated() / 1e9:.1f} GB made in {time.perf_counter() - start:.1f} s")
    seat(model, 1, arguments.context, WARM_UP_STEPS + 1)
    for _ in range(WARM_UP_STEPS):
        model.decode_step()
    outside = kernels_outside_blocks(model, model.decode_step)
    record = gpu_header() | {
        "layers": [kind for kind, _ in layers],
        "experts": arguments.experts,
        "weights": "random; FP8 linears, MXFP4 experts",
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "context": arguments.context,
        "steps": arguments.steps,
        "kernels_outside_blocks": outside,
        "runs": [],
    }
    for compiled in (False, True) if arguments.compile else (False,):
        if compiled:
            model.compile()
        for batch in tqdm(arguments.batch, unit="batch", leave=False):
            run = measure(model, batch, arguments.context, arguments.steps, outside)
            record["runs"].append(run | {"compiled": compiled})
            print_run(record["runs"][-1], len(layers))
            torch.cuda.empty_cache()
    gpu = record["gpu"]["name"].lower().removeprefix("nvidia ").split()[0]
    write(arguments.out or RESULTS / f"decode_flash{len(layers)}_{gpu}.json", record)


if __name__ == "__main__":
    main()
