"""What one case took beside its floor and the peers, as a row of a result file, and the table of such rows."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from benchmarks.case import Case
from benchmarks.floors import Ceilings, floor
from benchmarks.peers import best_peer
from benchmarks.targets import COLD_TARGETS, TARGETS
from benchmarks.timing import Times

Row = Mapping[str, Any]
COLUMNS = ("warm", "cold", "streamed", "floor", "share", "peer", "ratio", "target")
KERNEL_COLUMNS = ("warm", "cold", "floor", "share", "peer", "ratio")  # of the README's table


def result(case: Case, times: Times, ceilings: Ceilings, measured: Ceilings) -> dict[str, Any]:
    """`ceilings` are those of the share, `measured` those of this run; times in us.

    The share is the floor over the cold time: warm calls find a part of their data in L2, whatever their size, and the
    floor assumes that all of it comes from memory.
    """
    least, traffic = floor(case.traffic, ceilings), case.traffic
    peer = best_peer(case.peers)
    return {
        "op": case.op_name,
        "case": case.label,
        "runs": "reference" if case.is_reference else "kernel",
        "warm": round(times.warm, 3),
        "cold": round(times.cold, 3),
        "streamed_us": None if times.streamed is None else round(times.streamed, 3),
        "calls_a_graph": times.calls,
        "floor": round(least.us, 3),
        "floor_by_measured_ceilings": round(floor(traffic, measured).us, 3),
        "bound": "latency" if least.is_latency else least.bound,
        "share": None if least.is_latency else round(least.us / times.cold, 3),
        "bytes_read": traffic.read,
        "bytes_written": traffic.written,
        "flops": traffic.flops,
        "peer": None if peer is None else {"kernels": list(peer.kernels), "warm": peer.us, "cold": peer.cold_us},
        "ratio": None if peer is None else round(times.warm / peer.us, 3),
        "target": TARGETS.get(case.name),
        "cold_target": COLD_TARGETS.get(case.name),
    }


def failure(case: Case, error: Exception) -> dict[str, Any]:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return {"op": case.op_name, "case": case.label, "error": text}


def cells(row: Row) -> dict[str, str]:
    """The numbers of a row by column, in the order of COLUMNS."""
    streamed = row.get("streamed_us")  # None or not there: not timed
    peer = ("", "") if row["peer"] is None else (f"{row['peer']['warm']:.2f}", f"{row['ratio']:.2f}")
    goals = ((row["target"], ""), (row.get("cold_target"), " cold"))
    target = "".join(f"{us:g}{temperature}" for us, temperature in goals if us is not None)
    times = (f"{row['warm']:.2f}", f"{row['cold']:.2f}", "" if streamed is None else f"{streamed:.2f}")
    numbers = (*times, f"{row['floor']:.2f}", share(row, row["cold"]), *peer, target)
    return dict(zip(COLUMNS, numbers, strict=True))


def peer_names(row: Row) -> str:
    """The peers' kernels, the same one several times as `2 x name`."""
    if row["peer"] is None:
        return ""
    kernels = row["peer"]["kernels"]
    counts = {name: kernels.count(name) for name in kernels}
    return " + ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())


def text_lines(rows: Iterable[Row], width: int) -> Iterator[str]:
    """A table for a terminal, line by line as rows come; `width` characters for operator and case."""
    yield f"{'us':<{width}}" + "".join(f" {column:>8}" for column in COLUMNS) + "  peer"
    for row in rows:
        mark = " (reference)" if row.get("runs") == "reference" else ""
        name = f"{row['op']} {row['case']}{mark}"
        if "error" in row:
            yield f"{name:<{width}}  {row['error']}"
            continue
        yield f"{name:<{width}}" + "".join(f" {cell:>8}" for cell in cells(row).values()) + f"  {peer_names(row)}"


def markdown(record: Mapping[str, Any]) -> str:
    """The README's table: the headline cases of a record."""
    lines = [
        "| operator | case | warm | cold | floor | share of floor | peer | ours / peer | the peer's kernels |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in headlines(record):
        peers = ", ".join(f"`{name}`" for name in peer_names(row).split(" + ") if name)
        numbers = " | ".join(cells(row)[column] for column in KERNEL_COLUMNS)
        lines.append(f"| `{row['op']}` | {row['case']} | {numbers} | {peers} |")
    return "\n".join(lines)


def headlines(record: Mapping[str, Any]) -> list[Row]:
    """The measured rows that TARGETS names, in its order."""
    return named(record, TARGETS)


def named(record: Mapping[str, Any], names: Iterable[str]) -> list[Row]:
    rows = {f"{row['op']} {row['case']}": row for row in record["rows"] if "error" not in row}
    return [rows[name] for name in names if name in rows]


def product_markdown(record: Mapping[str, Any]) -> str:
    """The README's table of products whose weights are in memory: what COLD_TARGETS names, in its order."""
    lines = [
        "| product | case | µs, streamed | rate | share of floor | µs, cold | rate | share of floor | µs, warm "
        "| target | peers' best, cold | the peer's kernels |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in named(record, COLD_TARGETS):
        target = COLD_TARGETS[f"{row['op']} {row['case']}"]
        peer, names = "", ", ".join(f"`{name}`" for name in peer_names(row).split(" + ") if name)
        if row["peer"] is not None:
            cold = row["peer"]["cold"]
            peer = f"{row['peer']['warm']:.1f} (warm)" if cold is None else f"{cold:.1f}"
        times = f"{time_columns(row, row.get('streamed_us'))} | {time_columns(row, row['cold'])} | {row['warm']:.1f}"
        lines.append(f"| `{row['op']}` | {row['case']} | {times} | {target:g} | {peer} | {names} |")
    return "\n".join(lines)


def time_columns(row: Row, us: float | None) -> str:
    """Time, rate and share of the floor of a call that took `us`; empty where it was not timed."""
    return " |  | " if us is None else f"{us:.1f} | {rate(row, us)} | {share(row, us)}"


def share(row: Row, us: float) -> str:
    return "latency" if row["share"] is None else f"{row['floor'] / us:.0%}"


def rate(row: Row, us: float) -> str:
    """What a call of `us` moves or computes a second, whichever bounds it."""
    if row["bound"] in ("memory", "latency"):
        return f"{(row['bytes_read'] + row['bytes_written']) / us / 1e3:.0f} GB/s"
    return f"{row['flops'] / us / 1e6:.0f} TFLOP/s"
