"""Draw docs/attention.svg: a decode step's attention against the length of context, for each kind of layer.

    python -m docs.attention_chart            writes docs/attention.svg from benchmarks/results/attention_h200.json
    python -m docs.attention_chart --check    fails if docs/attention.svg is not what this script draws

A panel is a batch, a line a kind of layer; rings are FlashMLA where it was measured. Times are warm medians, both axes
logarithmic. Without a result file, or without times at several contexts in it, there is no picture.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.attention_gpu import CHART_SOURCE, KINDS, SWEEP_HEADS, curves, goal_of, peer_us, short
from docs.svg import Canvas, Point, publish

TARGET = Path(__file__).with_name("attention.svg")
LEFT, TOP, BOTTOM, HEIGHT = 24, 118, 62, 440
PANEL, PLOT, Y_LABELS = 430, 330, 40  # widths: of a panel, of the plot in it, of the numbers before the plot
COLOURS = {"window": "#0f766e", "selected": "#2563eb", "compressed": "#d9480f"}
GRID = "#e2e8f0"
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


@dataclass(frozen=True)
class Scale:
    """Numbers from `low` to `high` on a logarithmic axis from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return round(self.start + share * (self.end - self.start), 1)


def draw(record: Mapping[str, Any]) -> str:
    """The picture of a record that has times at several contexts."""
    panels = curves(record["rows"])
    width = max(2 * LEFT + PANEL * len(panels), 620)  # of the heading
    c = Canvas(width, HEIGHT, "Time of sparse attention in a decode step against the length of context")
    heading(c, record)
    times = [us for kinds in panels.values() for rows in kinds.values() for row in rows for us in times_of(row)]
    ticks = ticks_around(min(times), max(times))
    vertical = Scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    for number, (batch, kinds) in enumerate(panels.items()):
        left = LEFT + Y_LABELS + PANEL * number
        contexts = sorted({row["context"] for rows in kinds.values() for row in rows})
        horizontal = Scale(contexts[0], contexts[-1], left, left + PLOT)
        title = f"{batch} sequence{'s' if batch > 1 else ''}"
        c.text((left, TOP - 14), title, "lane", "start")
        grid(c, horizontal, vertical, contexts, ticks)
        for rows in kinds.values():
            draw_curve(c, rows, [(horizontal(row["context"]), vertical(row["warm_us"])) for row in rows])
            draw_peers(c, horizontal, vertical, rows)
        label_ends(c, left + PLOT + 8, {kind: vertical(rows[-1]["warm_us"]) for kind, rows in kinds.items()})
    c.text((LEFT, HEIGHT - 14), "tokens before the step; FlashMLA was measured at 32K", anchor="start")
    return str(c)


def times_of(row: Mapping[str, Any]) -> tuple[float, ...]:
    peer = peer_us(goal_of(row))
    return (row["warm_us"],) if peer is None else (row["warm_us"], peer)


def ticks_around(low: float, high: float) -> tuple[float, ...]:
    first = max((tick for tick in TICKS if tick <= low), default=TICKS[0])
    last = min((tick for tick in TICKS if tick > high), default=TICKS[-1])
    return tuple(tick for tick in TICKS if first <= tick <= last)


def heading(c: Canvas, record: Mapping[str, Any]) -> None:
    gpu = record["gpu"]["name"].removeprefix("NVIDIA ")
    title = f"Attention of a decode step on an {gpu}, {SWEEP_HEADS} heads, in µs"
    c.text((LEFT, 34), title, "title", "start")
    x = LEFT
    for kind, layer in KINDS.items():
        c.add("line", x1=x, y1=56, x2=x + 22, y2=56, stroke=COLOURS[kind], stroke_width=2)
        c.add("circle", cx=x + 11, cy=56, r=3.5, fill=COLOURS[kind])
        c.text((x + 29, 60), layer, anchor="start")
        x += 90
    c.add("circle", cx=x + 6, cy=56, r=5.5, fill="none", stroke="#64748b", stroke_width=2)
    c.text((x + 19, 60), "FlashMLA, same work as the line of its colour", anchor="start")


def grid(c: Canvas, horizontal: Scale, vertical: Scale, contexts: Sequence[int], ticks: Sequence[float]) -> None:
    for tick in ticks:
        y = vertical(tick)
        c.add("line", x1=horizontal.start, y1=y, x2=horizontal.end, y2=y, stroke=GRID, stroke_width=1)
        c.text((horizontal.start - 8, y + 4), f"{tick:g}", "shape", "end")
    for context in contexts:
        x = horizontal(context)
        c.add("line", x1=x, y1=vertical.start, x2=x, y2=vertical.start + 5, stroke="#94a3b8", stroke_width=1)
        if math.log2(context) % 2 == 0:  # 1K, 4K, 16K, ...: 32K has no room beside 16K and 64K
            c.text((x, vertical.start + 19), short(context), "shape")


def draw_curve(c: Canvas, rows: Sequence[Mapping[str, Any]], points: Sequence[Point]) -> None:
    colour = COLOURS[rows[0]["kind"]]
    path = " L".join(f"{x} {y}" for x, y in points)
    c.add("path", d=f"M{path}", fill="none", stroke=colour, stroke_width=2)
    for x, y in points:
        c.add("circle", cx=x, cy=y, r=3.5, fill=colour)


def draw_peers(c: Canvas, horizontal: Scale, vertical: Scale, rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        us = peer_us(goal_of(row))
        if us is not None:
            at = {"cx": horizontal(row["context"]), "cy": vertical(us)}
            c.add("circle", **at, r=5.5, fill="none", stroke=COLOURS[row["kind"]], stroke_width=2)


def label_ends(c: Canvas, x: float, ends: Mapping[str, float]) -> None:
    """Names at the right ends of the lines, from the lowest up, moved apart where they would touch."""
    below = math.inf
    for kind, y in sorted(ends.items(), key=lambda end: -end[1]):
        below = min(y + 4, below - 13)
        c.text((x, round(below, 1)), KINDS[kind], "lane", "start")


def load() -> Mapping[str, Any] | None:
    """The record, None where there is none or none of its curves has two points."""
    if not CHART_SOURCE.is_file():
        return None
    record = json.loads(CHART_SOURCE.read_text(encoding="utf-8"))
    return record if curves(record["rows"]) else None


def main() -> int:
    record = load()
    picture = None if record is None else draw(record)
    return publish(TARGET, picture, f"{CHART_SOURCE} has nothing to draw; run `dsv4 bench attention` on an H200")


if __name__ == "__main__":
    sys.exit(main())
