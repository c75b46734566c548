"""Sparse attention on a GPU: the cases of the project's goals, warm and cold, as one JSON object a line.

python -m benchmarks.attention_gpu [--filter REGEX] [--replays N]
"""

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from benchmarks.inputs import Inputs
from benchmarks.timing import Timer
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--filter", default="", help="only goals whose name matches")
    parser.add_argument("--replays", type=int, default=31)
    options = parser.parse_args()
    timer, device = Timer(options.replays), torch.cuda.get_device_name()
    for goal in dict.fromkeys(goals()):
        if not re.search(options.filter, goal.name):
            continue
        arguments = goal.arguments(Inputs("cuda"))
        op = TABLE[f"sparse_attention_{goal.kind}"].overload
        times = timer.times(lambda op=op, arguments=arguments: op(*arguments))
        flops = 4 * goal.batch * goal.rows * goal.heads * DIM * goal.keys
        record = {"name": goal.name, **asdict(goal), "warm_us": round(times.warm, 2), "cold_us": round(times.cold, 2)}
        print(json.dumps({**record, "tflops": round(flops / times.warm / 1e6, 1), "gpu": device}), flush=True)


if __name__ == "__main__":
    main()
