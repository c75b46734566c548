"""Index selections on a GPU: time in a CUDA graph, warm and with L2 flushed, and peak memory beyond the arguments.

Beside them stands what the peers' kernels take on an H200 for logits, metadata and top-k. Scores alone are timed where
they fit in 1 GiB. Every query sees the whole context, as in the peers' measurements. Random queries and keys: scores
without a pattern. A chart shows time and memory against the length of context.
"""

import argparse
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.inputs import Inputs
from benchmarks.record import RESULTS, gpu_header, write
from benchmarks.timing import Timer
from dsv4_ops.kernels import require_kernels
from dsv4_ops.registry import TABLE

HEADS, DIM, RATIO, PAGE_SIZE = 64, 128, 4, 64
FORMS = ("fp8", "fp4")
REPLAYS = 31


@dataclass(frozen=True)
class Case:
    """`rows` queries of each of `batch` sequences over `entries` keys. Times in us: the best of the peers (logits,
    metadata, top-k; None: not measured) and what this project set out for, both FP8."""

    batch: int
    rows: int
    entries: int
    k: int
    peers: float | None
    target: float | None

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.rows} rows, {self.entries} keys, k {self.k}"


CASES = (
    Case(1, 1, 8192, 512, 10.0, 6.5),
    Case(1, 1, 65536, 512, 16.0, 12),
    Case(1, 1, 65536, 1024, 16.0, 12),
    Case(16, 1, 8192, 512, 13.5, 9),
    Case(64, 1, 8192, 512, 29.9, 25),
    Case(64, 1, 65536, 512, 171, 150),
    Case(1, 1, 262144, 512, 40, 25),
    Case(1, 4, 8192, 512, None, None),
    Case(1, 4096, 4096, 512, 340, 320),
    Case(1, 4096, 16384, 512, 1269, 1150),
    Case(1, 512, 262144, 1024, None, None),
)


def make_arguments(case: Case, form: str) -> tuple:
    inputs = Inputs("cuda")
    table = inputs.block_table(case.batch, case.entries, PAGE_SIZE)
    pool = inputs.index_pool(table, PAGE_SIZE, DIM, fp8=form == "fp8")
    shape = (case.batch, case.rows, HEADS, DIM)
    query = inputs.fp8(*shape, group=DIM)[:1] if form == "fp8" else inputs.mxfp4(*shape)
    w = inputs.normal(case.batch, case.rows, HEADS, dtype=torch.float32)
    last = case.entries * RATIO - 1
    positions = torch.full((case.batch, case.rows), last, dtype=torch.int32, device="cuda")
    return *query, w, pool, table, positions, RATIO, PAGE_SIZE


def peak_bytes(call) -> int:
    """Beyond what is allocated before; outputs count."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@torch.no_grad()
def measure(case: Case, form: str, timer: Timer) -> dict[str, Any]:
    arguments = make_arguments(case, form)
    topk, scores = TABLE[f"index_topk_{form}"].overload, TABLE[f"index_scores_{form}"].overload
    peak = peak_bytes(lambda: topk(*arguments, case.k))
    times = timer.times(lambda: topk(*arguments, case.k))
    fits = case.batch * case.rows * case.entries * 4 <= 1 << 30  # all scores at once
    scores_us = timer.warm(lambda: scores(*arguments))[0] if fits else None
    return {
        "form": form,
        **asdict(case),
        "warm_us": round(times.warm, 2),
        "cold_us": round(times.cold, 2),
        "scores_op_us": None if scores_us is None else round(scores_us, 2),
        "peak_extra_bytes": peak,
    }


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """A table with a line for each row."""
    lines = ["| case | form | µs, warm | cold | scores alone | peers | target | extra MiB |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        case = Case(**{key: row[key] for key in Case.__dataclass_fields__})
        others = (row["scores_op_us"], case.peers, case.target)
        columns = " | ".join("" if value is None else f"{value:g}" for value in others)
        extra = row["peak_extra_bytes"] / 2**20
        times = f"{row['warm_us']:.1f} | {row['cold_us']:.1f}"
        lines.append(f"| {case.name} | {row['form']} | {times} | {columns} | {extra:.1f} |")
    return "\n".join(lines)


def bar(us: float, most: float, mark: str) -> str:
    """A bar of up to 40 marks for `us` of `most`, logarithmic from 1 us on."""
    return mark * max(1, round(40 * math.log(max(us, 1.0)) / math.log(max(most, math.e))))


def chart(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of time and memory against context: a group for each batch, k and form, ours (#) above the peers' (-)."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["form"], row["batch"], row["rows"], row["k"]), []).append(row)
    most = max(max(row["warm_us"], row["peers"] or 0.0) for row in rows)
    lines = []
    for (form, batch, count, k), group in groups.items():
        title = f"{form}, {batch} x {count} rows, k {k}: us, # ours, - peers, logarithmic; MiB beyond the arguments"
        lines += ["", title]
        for row in sorted(group, key=lambda row: row["entries"]):
            extra = f"{row['peak_extra_bytes'] / 2**20:.1f} MiB"
            lines.append(f"{row['entries']:>7} keys {row['warm_us']:>8.1f} {bar(row['warm_us'], most, '#')} {extra}")
            if row["peers"] is not None:
                lines.append(f"{'':>12} {row['peers']:>8.1f} {bar(row['peers'], most, '-')}")
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.indexer_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--form", choices=FORMS, nargs="+", default=list(FORMS), help="formats of keys (default both)")
    parser.add_argument("--replays", type=int, default=REPLAYS, metavar="N", help=f"of each graph (default {REPLAYS})")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default benchmarks/results/indexer_GPU.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a GPU is needed, and torch sees none")
    return arguments


def run(replays: int, output: Path | None, forms: Iterable[str] = FORMS) -> None:
    """Time all cases, print table and chart, write the result file if there is a place for it."""
    require_kernels()
    timer = Timer(replays)
    rows = []
    for form, case in tqdm([(form, case) for form in forms for case in CASES], unit="case", leave=False):
        rows.append(measure(case, form, timer))
        torch.cuda.empty_cache()
    print(markdown(rows))
    print(*chart(rows), sep="\n")
    record = gpu_header() | {"heads": HEADS, "dim": DIM, "page_size": PAGE_SIZE, "rows": rows}
    if output is not None:
        write(output, record)


def main() -> None:
    arguments = parse()
    gpu = torch.cuda.get_device_name().lower().removeprefix("nvidia ").split()[0]
    run(arguments.replays, arguments.out or RESULTS / f"indexer_{gpu}.json", arguments.form)


if __name__ == "__main__":
    main()
