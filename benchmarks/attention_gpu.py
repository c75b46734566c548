"""Sparse attention on a GPU: the cases of the README's table, and a decode step against the length of context.

The table is of sequences of 32K tokens, warm and with L2 flushed. The chart is of one row each of 1 and 16 sequences,
64 heads, after 1K to 1M tokens, for the three kinds of layers: window alone, CSA (the best 512 of the entries of 4
tokens each), HCA (all entries of 128 tokens each). Beside both stands what FlashMLA takes on an H200, without its
metadata kernel, in prefill from a bf16 cache; benchmarks/peers.json has it at 32K.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.indexer_gpu import bar
from benchmarks.inputs import Inputs
from benchmarks.peers import fastest, kernel
from benchmarks.record import RESULTS, ROOT, gpu_header, write
from benchmarks.timing import Timer
from dsv4_ops.kernels import require_kernels
from dsv4_ops.ops.attention_mixed import split_queries
from dsv4_ops.registry import TABLE

WINDOW, PAGE, DIM, ROPE = 128, 64, 512, 64
RATIO_CSA, RATIO_HCA = 4, 128
TABLE_CONTEXT = 32768
CONTEXTS = (1024, 4096, 16384, TABLE_CONTEXT, 65536, 262144, 1048576)
KINDS = {"window": "window", "selected": "CSA", "compressed": "HCA"}  # of the chart: form of the operator, layer
SWEEP_HEADS, SWEEP_K, SWEEP_BATCHES = 64, 512, (1, 16)
LEAST_PEER_HEADS = 64  # FlashMLA pads fewer
REPLAYS = 31
CHART_SOURCE = RESULTS / "attention_h200.json"  # what docs/attention.svg shows


@dataclass(frozen=True)
class Goal:
    """One call: `batch` sequences of `rows` query rows at the end of `context` tokens."""

    kind: str  # window, selected (k entries of the context's), mixed (the same) or compressed (all of ratio 128)
    heads: int
    batch: int
    rows: int = 1
    k: int = 0
    context: int = TABLE_CONTEXT

    @property
    def name(self) -> str:
        more = f"+{self.keys - WINDOW}" if self.kind != "window" else ""
        return f"{self.kind} H={self.heads} B={self.batch} S={self.rows} {WINDOW}{more} of {self.context}"

    @property
    def flops(self) -> int:
        return 4 * self.batch * self.rows * self.heads * DIM * self.keys

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


def goals() -> list[Goal]:
    """All that is timed, each once: the table's cases, then those of the chart that are not among them."""
    return list(dict.fromkeys((*table_goals(), *sweep_goals())))


def table_goals() -> Iterator[Goal]:
    for batch in (1, 16, 128):
        yield Goal("window", 64, batch)
        yield Goal("selected", 64, batch, k=512)
        yield Goal("selected", 128, batch, k=1024)
        yield Goal("compressed", 64, batch)
    yield Goal("compressed", 128, 128)
    for heads in (8, 16, 32):
        yield Goal("selected", heads, 128, k=512)
    yield Goal("selected", 64, 16, rows=4, k=512)  # speculation
    for heads in (64, 128):
        for k in (512, 1024):
            yield Goal("selected", heads, 1, rows=4096, k=k)
    yield Goal("mixed", 64, 1, rows=4096, k=1024)


def sweep_goals() -> Iterator[Goal]:
    """A decode step of every kind of layer against the length of context."""
    for batch in SWEEP_BATCHES:
        for context in CONTEXTS:
            yield Goal("window", SWEEP_HEADS, batch, context=context)
            yield Goal("selected", SWEEP_HEADS, batch, k=min(SWEEP_K, context // RATIO_CSA - 1), context=context)
            yield Goal("compressed", SWEEP_HEADS, batch, context=context)


# name of a goal: us, where S is more than 1 TFLOP/s
TARGETS: Mapping[str, float] = {
    "window H=64 B=1 S=1 128 of 32768": 5,
    "window H=64 B=16 S=1 128 of 32768": 6,
    "window H=64 B=128 S=1 128 of 32768": 12,
    "selected H=64 B=1 S=1 128+512 of 32768": 7.5,
    "selected H=64 B=16 S=1 128+512 of 32768": 12,
    "selected H=64 B=128 S=1 128+512 of 32768": 42,
    "selected H=128 B=1 S=1 128+1024 of 32768": 9,
    "selected H=128 B=16 S=1 128+1024 of 32768": 22,
    "selected H=128 B=128 S=1 128+1024 of 32768": 100,
    "compressed H=64 B=128 S=1 128+256 of 32768": 26,
    "compressed H=128 B=128 S=1 128+256 of 32768": 42,
    "selected H=16 B=128 S=1 128+512 of 32768": 24,
    "selected H=64 B=1 S=4096 128+512 of 32768": 500,
    "selected H=64 B=1 S=4096 128+1024 of 32768": 535,
    "selected H=128 B=1 S=4096 128+512 of 32768": 510,
    "selected H=128 B=1 S=4096 128+1024 of 32768": 530,
    "mixed H=64 B=1 S=4096 128+1024 of 32768": 600,
}


def peer_us(goal: Goal) -> float | None:
    """FlashMLA, of the mixed form SGLang; None where it was not measured."""
    if goal.context != TABLE_CONTEXT:
        return None
    if goal.rows > 1:
        name = "sgl_q8kv8_prefill" if goal.kind == "mixed" else "flashmla_prefill_bf16"
        found = fastest(kernel(name, h=goal.heads, s_q=goal.rows, topk=goal.keys))
    else:
        plan = {"window": "swa", "compressed": "hca_32k"}.get(goal.kind, f"csa{goal.k}_32k")
        heads = max(goal.heads, LEAST_PEER_HEADS)
        found = fastest(kernel("flashmla_decode_fp8", h=heads, plan=plan, b=goal.batch, s_q=1))
    return None if found is None else found.us


@torch.no_grad()
def measure(goal: Goal, timer: Timer) -> dict[str, Any]:
    arguments = goal.arguments(Inputs("cuda"))
    times = timer.times(partial(TABLE[f"sparse_attention_{goal.kind}"].overload, *arguments))
    us = {"warm_us": round(times.warm, 2), "cold_us": round(times.cold, 2)}
    return {"name": goal.name, **asdict(goal), **us, "tflops": round(goal.flops / times.warm / 1e6, 1)}


def goal_of(row: Mapping[str, Any]) -> Goal:
    return Goal(**{key: row[key] for key in Goal.__dataclass_fields__})


def markdown(record: Mapping[str, Any]) -> str:
    """The README's table; the peer and the target of prefill are rates."""
    lines = ["| case | µs, warm | cold | TFLOP/s | peer | target |", "|---|--:|--:|--:|--:|--:|"]
    for row in record["rows"]:
        goal = goal_of(row)
        if goal.context != TABLE_CONTEXT:
            continue
        unit, us, target = " TFLOP/s" if goal.rows > 1 else "", peer_us(goal), TARGETS.get(goal.name)
        peer = "" if us is None else f"{goal.flops / us / 1e6:.0f}{unit}" if goal.rows > 1 else f"{us:.1f}"
        aim = "" if target is None else f"{target:g}{unit}"
        numbers = f"{row['warm_us']:.1f} | {row['cold_us']:.1f} | {row['tflops']:.0f}"
        lines.append(f"| {goal.name} | {numbers} | {peer} | {aim} |")
    return "\n".join(lines)


def curves(rows: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, list[Mapping[str, Any]]]]:
    """Rows of the chart, by batch and kind, in the order of context: those that have at least two contexts."""
    wanted, found = set(sweep_goals()), {}
    for row in sorted(rows, key=lambda row: row["context"]):
        if goal_of(row) in wanted:
            found.setdefault(row["batch"], {}).setdefault(row["kind"], []).append(row)
    many = {
        batch: {kind: kinds[kind] for kind in KINDS if len(kinds.get(kind, ())) > 1} for batch, kinds in found.items()
    }
    return {batch: kinds for batch, kinds in sorted(many.items()) if kinds}


def chart(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines of time against context: a group for each batch and kind of layer, ours (#) above FlashMLA's (-)."""
    groups = [(batch, kind, group) for batch, kinds in curves(rows).items() for kind, group in kinds.items()]
    times = [us for _, _, group in groups for row in group for us in (row["warm_us"], peer_us(goal_of(row)) or 0.0)]
    lines = []
    for batch, kind, group in groups:
        lines += ["", f"{KINDS[kind]}, B={batch}, H={SWEEP_HEADS}: us, # ours, - FlashMLA, logarithmic"]
        for row in group:
            us, theirs = row["warm_us"], peer_us(goal_of(row))
            lines.append(f"{short(row['context']):>5} {us:>8.1f} {bar(us, max(times), '#')}")
            if theirs is not None:
                lines.append(f"{'':>5} {theirs:>8.1f} {bar(theirs, max(times), '-')}")
    return lines


def short(context: int) -> str:
    return f"{context >> 20}M" if context >= 1 << 20 else f"{context >> 10}K"


def run(replays: int, output: Path | None, pattern: str = "") -> None:
    """Time the goals whose name the pattern finds, print table and chart, write the result file if there is a place."""
    require_kernels()
    timer, rows = Timer(replays), []
    for goal in tqdm([goal for goal in goals() if re.search(pattern, goal.name)], unit="case", leave=False):
        rows.append(measure(goal, timer))
        torch.cuda.empty_cache()
    print(markdown({"rows": rows}))
    print(*chart(rows), sep="\n")
    if output is None:
        return
    write(output, gpu_header() | {"replays": replays, "rows": rows})
    if output.resolve() == CHART_SOURCE.resolve():
        subprocess.run([sys.executable, "-m", "docs.attention_chart"], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention_gpu",
        description=f"{__doc__}\nThe same as `dsv4 bench attention`, or a part of it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--filter", default="", metavar="REGEX", help="only cases whose name matches; writes no file")
    parser.add_argument("--replays", type=int, default=REPLAYS, metavar="N", help=f"of each graph (default {REPLAYS})")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default benchmarks/results/attention_GPU.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a GPU is needed, and torch sees none")
    gpu = torch.cuda.get_device_name().lower().removeprefix("nvidia ").split()[0]
    default = None if arguments.filter else RESULTS / f"attention_{gpu}.json"
    run(arguments.replays, arguments.out or default, arguments.filter)


if __name__ == "__main__":
    main()
