"""Sparse attention on a GPU: the cases of the project's goals, warm and with L2 flushed.

Beside some of them stand what FlashMLA takes on an H200, without its metadata kernel, and what this project set out
for: microseconds in decode, TFLOP/s in prefill, where FlashMLA reads a bf16 cache.
"""

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.inputs import Inputs
from benchmarks.record import RESULTS, gpu_header, write
from benchmarks.timing import Timer
from dsv4_ops.kernels import require_kernels
from dsv4_ops.ops.attention_mixed import split_queries
from dsv4_ops.registry import TABLE

WINDOW, PAGE, DIM, ROPE = 128, 64, 512, 64
RATIO_CSA, RATIO_HCA = 4, 128
CONTEXTS = tuple(1024 * 4**power for power in range(6))  # 1K .. 1M


@dataclass(frozen=True)
class Goal:
    """One call: `batch` sequences of `rows` query rows at the end of `context` tokens."""

    kind: str  # window, selected (k entries of the context's), mixed (the same) or compressed (all of ratio 128)
    heads: int
    batch: int
    rows: int = 1
    k: int = 0
    context: int = 32768

    @property
    def name(self) -> str:
        more = f"+{self.keys - WINDOW}" if self.kind != "window" else ""
        return f"{self.kind} H={self.heads} B={self.batch} S={self.rows} {WINDOW}{more} of {self.context}"

    @property
    def keys(self) -> int:
        return WINDOW + (self.context // RATIO_HCA if self.kind == "compressed" else self.k)

    def arguments(self, inputs: Inputs) -> tuple:
        batch, rows = self.batch, self.rows
        table = inputs.block_table(batch, WINDOW + rows - 1, PAGE)
        pool = inputs.kv_pool(table, PAGE, DIM, ROPE)
        q, sink = inputs.normal(batch, rows, self.heads, DIM), inputs.normal(self.heads, dtype=torch.float32)
        rope, at = inputs.rope_table(ROPE, self.context), inputs.positions(batch, rows, self.context - 1)
        if self.kind == "window":
            return q, pool, sink, rope, table, at, WINDOW, PAGE
        ratio, page = (RATIO_HCA, 2) if self.kind == "compressed" else (RATIO_CSA, PAGE)
        far_table = inputs.block_table(batch, self.context // ratio, page)
        far_pool = inputs.kv_pool(far_table, page, DIM, ROPE)
        queries = split_queries(q, ROPE) if self.kind == "mixed" else (q,)
        pools, tables = (*queries, pool, far_pool, sink, rope), (table, far_table)
        if self.kind == "compressed":
            return *pools, *tables, at, WINDOW, ratio, PAGE, page
        entries = (self.context - rows) // ratio  # complete for all rows
        chosen = [inputs.uniform(rows, entries).topk(self.k).indices.sort(-1).values for _ in range(batch)]
        return *pools, *tables, torch.stack(chosen).to(torch.int32), at, WINDOW, PAGE, page


def goals() -> Iterator[Goal]:
    batches = (1, 16, 128)
    for batch in batches:
        yield Goal("window", 64, batch)
        yield Goal("selected", 64, batch, k=512)
        yield Goal("selected", 128, batch, k=1024)
    yield Goal("compressed", 64, 128)
    yield Goal("compressed", 128, 128)
    for heads in (8, 16, 32):
        yield Goal("selected", heads, 128, k=512)
    yield Goal("selected", 64, 16, rows=4, k=512)  # speculation
    for heads in (64, 128):
        for k in (512, 1024):
            yield Goal("selected", heads, 1, rows=4096, k=k)
    yield Goal("mixed", 64, 1, rows=4096, k=1024)
    for context in CONTEXTS:
        yield Goal("window", 64, 1, context=context)
        yield Goal("selected", 64, 1, k=min(512, context // RATIO_CSA - 1), context=context)
        yield Goal("compressed", 64, 1, context=context)


# name of a goal: FlashMLA (of the mixed form: SGLang), target
AIMS = {
    "window H=64 B=1 S=1 128 of 32768": (10.4, 5),
    "window H=64 B=16 S=1 128 of 32768": (11.6, 6),
    "window H=64 B=128 S=1 128 of 32768": (15.0, 12),
    "selected H=64 B=1 S=1 128+512 of 32768": (12.3, 7.5),
    "selected H=64 B=16 S=1 128+512 of 32768": (16.7, 12),
    "selected H=64 B=128 S=1 128+512 of 32768": (45.6, 42),
    "selected H=128 B=1 S=1 128+1024 of 32768": (13.8, 9),
    "selected H=128 B=16 S=1 128+1024 of 32768": (26.8, 22),
    "selected H=128 B=128 S=1 128+1024 of 32768": (103, 100),
    "compressed H=64 B=128 S=1 128+256 of 32768": (28.7, 26),
    "compressed H=128 B=128 S=1 128+256 of 32768": (44.7, 42),
    "selected H=16 B=128 S=1 128+512 of 32768": (45.6, 24),
    "selected H=64 B=1 S=4096 128+512 of 32768": (499, 500),
    "selected H=64 B=1 S=4096 128+1024 of 32768": (532, 535),
    "selected H=128 B=1 S=4096 128+512 of 32768": (509, 510),
    "selected H=128 B=1 S=4096 128+1024 of 32768": (524, 530),
    "mixed H=64 B=1 S=4096 128+1024 of 32768": (647, 600),
}


def measure(goal: Goal, timer: Timer) -> dict[str, Any]:
    arguments = goal.arguments(Inputs("cuda"))
    op = TABLE[f"sparse_attention_{goal.kind}"].overload
    times = timer.times(lambda: op(*arguments))
    flops = 4 * goal.batch * goal.rows * goal.heads * DIM * goal.keys
    us = {"warm_us": round(times.warm, 2), "cold_us": round(times.cold, 2)}
    return {"name": goal.name, **asdict(goal), **us, "tflops": round(flops / times.warm / 1e6, 1)}


def markdown(record: dict[str, Any]) -> str:
    """The README's table: the cases that have an aim."""
    lines = ["| case | µs, warm | cold | TFLOP/s | peer | target |", "|---|--:|--:|--:|--:|--:|"]
    for row in record["rows"]:
        if row["name"] not in AIMS:
            continue
        unit = " TFLOP/s" if row["rows"] > 1 else ""
        peer, target = (f"{aim:g}{unit}" for aim in AIMS[row["name"]])
        numbers = f"{row['warm_us']:.1f} | {row['cold_us']:.1f} | {row['tflops']:.0f}"
        lines.append(f"| {row['name']} | {numbers} | {peer} | {target} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--filter", default="", metavar="REGEX", help="only goals whose name matches; writes no file")
    parser.add_argument("--replays", type=int, default=31, metavar="N", help="of each graph (default 31)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default benchmarks/results/attention_GPU.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a GPU is needed, and torch sees none")
    return arguments


def main() -> None:
    options = parse()
    require_kernels()
    timer, rows = Timer(options.replays), []
    for goal in dict.fromkeys(goals()):
        if re.search(options.filter, goal.name):
            rows.append(measure(goal, timer))
            print(json.dumps(rows[-1]), flush=True)
    record = gpu_header() | {"replays": options.replays, "rows": rows}
    gpu = record["gpu"]["name"].lower().removeprefix("nvidia ").split()[0]
    if options.out or not options.filter:
        write(options.out or RESULTS / f"attention_{gpu}.json", record)


if __name__ == "__main__":
    main()
