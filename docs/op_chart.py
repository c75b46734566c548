"""Draw docs/ops.svg: what the headline operators take on an H200, beside their floors and the peers' kernels.

    python -m docs.op_chart            writes docs/ops.svg from benchmarks/results/ops_h200.json
    python -m docs.op_chart --check    fails if docs/ops.svg is not what this script draws

A row is a case. The grey bar ends at the floor: no kernel whose data comes from memory can be inside of it. Times are
warm medians, on one logarithmic axis, because they span two orders of magnitude. Without a result file there is no
picture.
"""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS
from benchmarks.result import Row, headlines
from docs.svg import Canvas, publish

TARGET = Path(__file__).with_name("ops.svg")
SOURCE = RESULTS / "ops_h200.json"
WIDTH, TOP, ROW_HEIGHT, BOTTOM = 900, 92, 30, 46
LEFT, AXIS, AXIS_END = 24, 372, 712  # labels, then the axis
NUMBERS = {"floor": 760, "ours": 814, "peer": 868}  # right edges of the columns
OURS, PEER, FLOOR, GRID = "#2563eb", "#d9480f", "#cbd5e1", "#eef2f6"
TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Axis:
    """us on a logarithmic scale between the ticks around the data."""

    def __init__(self, values: list[float]):
        low = max((tick for tick in TICKS if tick <= min(values)), default=TICKS[0])
        high = min((tick for tick in TICKS if tick >= max(values)), default=TICKS[-1])
        self.ticks = tuple(tick for tick in TICKS if low <= tick <= high)

    def x(self, us: float) -> float:
        """Place of a time; what is off the axis stands at its end."""
        low, high = math.log(self.ticks[0]), math.log(self.ticks[-1])
        share = (math.log(max(us, 1e-9)) - low) / (high - low)
        return round(AXIS + min(max(share, 0.0), 1.0) * (AXIS_END - AXIS), 1)


def draw(record: Mapping[str, Any]) -> str:
    """The picture of a record with at least one headline."""
    rows = headlines(record)
    height = TOP + ROW_HEIGHT * len(rows) + BOTTOM
    c = Canvas(WIDTH, height, "Times of operators beside their floors and the peers' kernels")
    axis = Axis([row["warm"] for row in rows] + [row["peer"]["warm"] for row in rows if row["peer"]])
    heading(c, record)
    grid(c, axis, TOP - 8, height - BOTTOM + 4)
    for number, row in enumerate(rows):
        draw_row(c, axis, row, TOP + ROW_HEIGHT * number + ROW_HEIGHT / 2)
    c.text((LEFT, height - 16), "Where several kernels of peers do the same work, theirs is the sum.", anchor="start")
    return str(c)


def heading(c: Canvas, record: Mapping[str, Any]) -> None:
    c.text((LEFT, 34), f"One call on an {record['gpu']['name'].removeprefix('NVIDIA ')}, in µs", "title", "start")
    c.add("rect", x=LEFT, y=50, width=20, height=12, fill=FLOOR)
    c.text((LEFT + 27, 60), "floor", anchor="start")
    c.add("circle", cx=LEFT + 82, cy=56, r=4.5, fill=OURS)
    c.text((LEFT + 93, 60), "this project", anchor="start")
    c.add("circle", cx=LEFT + 184, cy=56, r=5.5, fill="none", stroke=PEER, stroke_width=2)
    c.text((LEFT + 195, 60), "best of the peers", anchor="start")
    for name, right in NUMBERS.items():
        c.text((right, TOP - 14), name, "lane", "end")


def grid(c: Canvas, axis: Axis, top: float, bottom: float) -> None:
    for tick in axis.ticks:
        x = axis.x(tick)
        c.add("line", x1=x, y1=top, x2=x, y2=bottom, stroke=GRID, stroke_width=1.2)
        c.text((x, top - 6), f"{tick:g}", "shape")


def draw_row(c: Canvas, axis: Axis, row: Row, y: float) -> None:
    c.text((LEFT, y - 2), row["op"], "op", "start")
    c.text((LEFT, y + 11), row["case"], "shape", "start")
    floor, ours = axis.x(row["floor"]), axis.x(row["warm"])
    if floor > AXIS:
        c.add("rect", x=AXIS, y=y - 6, width=round(floor - AXIS, 1), height=12, fill=FLOOR)
    if row["peer"]:
        peer = axis.x(row["peer"]["warm"])
        c.add("line", x1=ours, y1=y, x2=peer, y2=y, stroke="#94a3b8", stroke_width=1.2)
    c.add("circle", cx=ours, cy=y, r=4.5, fill=OURS)
    if row["peer"]:
        c.add("circle", cx=peer, cy=y, r=5.5, fill="none", stroke=PEER, stroke_width=2)
    peer_us = "" if row["peer"] is None else f"{row['peer']['warm']:.2f}"
    for name, text in (("floor", f"{row['floor']:.2f}"), ("ours", f"{row['warm']:.2f}"), ("peer", peer_us)):
        c.text((NUMBERS[name], y + 4), text, "shape", "end")


def load() -> Mapping[str, Any] | None:
    """The record, None where there is none or none of its rows is a headline."""
    if not SOURCE.is_file():
        return None
    record = json.loads(SOURCE.read_text(encoding="utf-8"))
    return record if headlines(record) else None


def main() -> int:
    record = load()
    picture = None if record is None else draw(record)
    return publish(TARGET, picture, f"{SOURCE} has nothing to draw; run `dsv4 bench` on an H200")


if __name__ == "__main__":
    sys.exit(main())
