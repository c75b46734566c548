"""What the peers' kernels take, from peers.json: measured on one H200 with the method of `benchmarks.timing`.

A case names chains of kernels: what a peer launches one after another for the same work. Their times are added. Where a
kernel has several rows for a shape (numbers of splits), the fastest counts, so a sum may be less than any real chain.
Whole layers are those of transformers.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DATA = Path(__file__).with_name("peers.json")


@dataclass(frozen=True)
class Kernel:
    """A peer's kernel at one shape; `shape` may leave columns of the table open."""

    name: str
    shape: tuple[tuple[str, int | str], ...]


Chain = tuple[Kernel, ...]


@dataclass(frozen=True)
class PeerTime:
    kernels: tuple[str, ...]
    us: float
    cold_us: float | None

    @property
    def names(self) -> str:
        return " + ".join(self.kernels)


def kernel(name: str, **shape: int | str) -> Kernel:
    return Kernel(name, tuple(shape.items()))


@cache
def load() -> Mapping:
    return json.loads(DATA.read_text(encoding="utf-8"))


def fastest(wanted: Kernel) -> PeerTime | None:
    """The fastest row of a kernel at this shape, if any. KeyError for an unknown kernel, ValueError for a column."""
    table = load()["kernels"][wanted.name]
    places = [(table["columns"].index(column), value) for column, value in wanted.shape]
    rows = [row for row in table["rows"] if all(row[place] == value for place, value in places)]
    best = min(rows, key=lambda row: row[-2], default=None)
    return None if best is None else PeerTime((wanted.name,), best[-2], best[-1])


def layer_us(kind: str, batch: int) -> float | None:
    """The fastest mode of transformers for a layer of this kind in a decode step; None if it was not measured."""
    return min((row[-1] for row in load()["layers"]["rows"] if row[0] == kind and row[2] == batch), default=None)


def add_up(chain: Chain) -> PeerTime | None:
    """The kernels of a chain one after another; None if one of them was not measured at its shape."""
    times = [fastest(wanted) for wanted in chain]
    if any(time is None for time in times):
        return None
    cold = [time.cold_us for time in times]
    names = tuple(name for time in times for name in time.kernels)
    total_cold = None if None in cold else round(sum(cold), 2)
    return PeerTime(names, round(sum(time.us for time in times), 2), total_cold)


def best_peer(chains: Iterable[Chain]) -> PeerTime | None:
    """The chain with the least warm time, None if no chain was measured."""
    sums = [total for total in map(add_up, chains) if total is not None]
    return min(sums, key=lambda total: total.us, default=None)
