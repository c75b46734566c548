"""All matrix products of one V4-Flash CSA layer as a chain in one CUDA graph: what a layer's weights cost to read.

Each product depends on the one before it as in a decode step: it starts when that has ended, except for what
programmatic dependent launch lets it do before. The graph goes through LAYERS layers with weights of their own, some
GB in all, so that nothing is left in L2. Inputs are quantised beforehand. Beside the chain stands the sum of its
products one by one, cold: what they take if each has the GPU for itself.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.call import check_finite
from benchmarks.case import Case
from benchmarks.cases import gemm, moe, router
from benchmarks.floors import H200, Traffic, floor
from benchmarks.inputs import Inputs
from benchmarks.record import RESULTS, gpu_header, write
from benchmarks.shapes import FLASH, Widths
from benchmarks.timing import Timer, captured, replay_us
from dsv4_ops.kernels import require_kernels

LAYERS = 8
REPLAYS = 51
TARGET_US = 75.0  # of one token, MXFP4 experts
EXPERTS = ("mxfp4", "nvfp4")


def products(w: Widths, tokens: int, experts: str) -> list[Case]:
    """The products of a CSA layer in the order of a decode step; the gate selects the experts as well."""
    fp8 = {name: (rows, columns) for name, rows, columns in gemm.fp8_products(w)}
    fp32 = {name: (rows, columns) for name, rows, columns in gemm.fp32_products(w, tokens)}

    def linear(name: str) -> Case:
        return gemm.linear("fp8", name, tokens, *fp8[name])

    return [
        linear("q_a + kv"),
        linear("q_b"),
        gemm.fp32_linear("CSA compressors", tokens, *fp32["CSA compressors"]),
        linear("indexer q_b"),
        gemm.grouped_linear(gemm.W8A16, w, tokens),
        linear("wo_b"),
        next(case for case in router.cases(w, tokens) if case.op_name == "gate"),
        linear("shared w1 + w3"),
        linear("shared w2"),
        moe.case(w, tokens, experts, w.n_routed_experts),
    ]


def calls_of(cases: list[Case], device: str, layers: int) -> list[list[Callable[[], object]]]:
    """For each layer a call of each product, with weights of its own."""
    result = []
    for layer in range(layers):
        inputs = Inputs(device, seed=layer)
        arguments = [case.make(inputs) for case in cases]
        result.append([lambda op=case.op.overload, a=a: op(*a) for case, a in zip(cases, arguments, strict=True)])
        if layer == 0:
            for case, made in zip(cases, arguments, strict=True):
                check_finite(case.op, made)
    return result


@torch.no_grad()
def measure(w: Widths, tokens: int, experts: str) -> dict[str, Any]:
    cases = products(w, tokens, experts)
    layers = calls_of(cases, "cuda", LAYERS)
    us = replay_us(captured([call for layer in layers for call in layer]), REPLAYS) / LAYERS
    timer = Timer(REPLAYS)
    alone = [timer.cold(call) for call in layers[0]]
    traffic = sum((case.traffic for case in cases), Traffic(0, 0))
    return {
        "tokens": tokens,
        "experts": experts,
        "layer_us": round(us, 2),
        "bytes_read": traffic.read,
        "gb_a_second": round(traffic.read / us / 1e3, 1),
        "floor_us": round(floor(traffic, H200).us, 2),
        "target_us": TARGET_US if (tokens, experts) == (1, "mxfp4") else None,
        "alone_us": round(sum(alone), 2),
        "products": {case.name: round(each, 2) for case, each in zip(cases, alone, strict=True)},
    }


def markdown(record: dict[str, Any]) -> str:
    """The README's table: a line for each number of tokens and format of the experts."""
    lines = [
        "| tokens | experts | µs a layer | GB/s | floor | share of floor | target | products one by one, cold |",
        "|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in record["rows"]:
        target = "" if row["target_us"] is None else f"{row['target_us']:g}"
        numbers = f"{row['layer_us']:.1f} | {row['gb_a_second']:.0f} | {row['floor_us']:.1f}"
        share = f"{row['floor_us'] / row['layer_us']:.0%}"
        lines.append(f"| {row['tokens']} | {row['experts']} | {numbers} | {share} | {target} | {row['alone_us']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layer_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64], metavar="T", help="default 1 16 64")
    parser.add_argument("--experts", nargs="+", choices=EXPERTS, default=list(EXPERTS), help="formats (default both)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="default benchmarks/results/layer_products_GPU.json"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a GPU is needed, and torch sees none")
    require_kernels()
    record = gpu_header() | {"model": FLASH.model, "layers": LAYERS, "replays": REPLAYS, "rows": []}
    runs = [(tokens, experts) for tokens in arguments.tokens for experts in arguments.experts]
    for tokens, experts in tqdm(runs, unit="chain", leave=False):
        record["rows"].append(measure(FLASH, tokens, experts))
        torch.cuda.empty_cache()
    print(markdown(record))
    gpu = record["gpu"]["name"].lower().removeprefix("nvidia ").split()[0]
    write(arguments.out or RESULTS / f"layer_products_{gpu}.json", record)


if __name__ == "__main__":
    main()
