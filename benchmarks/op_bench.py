"""`dsv4 bench`: times operators at the released models' shapes beside their floors and the peers' kernels.

Nothing heavy is imported until a command runs.
"""

import argparse
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.case import Case

PACKAGE = Path(__file__).parent
REPLAYS, QUICK_REPLAYS = 31, 7
VIEWS = ("indexer", "attention")  # benchmarks/VIEW_gpu.py
DESCRIPTION = """\
Time operators on a GPU at the shapes of V4-Flash and V4-Pro, by replaying CUDA graphs: warm (the same inputs again and
again) and cold (L2 flushed before each call), products of decode also streamed (calls one behind the other, each with
weights of its own). Beside them stand the floor (what the operator must move or compute, over what the GPU can), the
share of it that was reached, and what the peers' kernels take for the same work on an H200.
Without --filter every operator that has a CUDA kernel is timed; --filter also finds those that run their reference.
`dsv4 bench indexer` draws time and memory of index selections against the length of context instead, `dsv4 bench
attention` times sparse attention: the cases of the README's table, and decode after 1K to 1M tokens for its chart."""


def add_bench(commands) -> None:
    """Register `bench` with the subparsers of the command line."""
    parser = commands.add_parser(
        "bench",
        help="time operators on a GPU",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run_bench)
    parser.add_argument(
        "view", nargs="?", choices=VIEWS, help="what to time against context; takes --quick and --output alone"
    )
    parser.add_argument("--filter", metavar="REGEX", help="only cases whose `operator case` matches, see --list")
    parser.add_argument("--model", choices=("flash", "pro", "both"), default="both", help="widths (default both)")
    parser.add_argument(
        "--tokens", metavar="T,T,...", help="tokens of a call (default: those of the family, see --list)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer replays: noisier numbers")
    parser.add_argument("--list", action="store_true", help="print the operators and cases, time nothing")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json",
        help="write the results (default of a checkout, if all cases were timed and without --quick: ops_<gpu>.json, "
        "indexer_<gpu>.json or attention_<gpu>.json in benchmarks/results; attention_h200.json is also drawn, as "
        "docs/attention.svg)",
    )  # fmt: skip


def run_bench(arguments: argparse.Namespace) -> None:
    if arguments.view is not None:
        return run_view(arguments)
    cases = select(arguments)
    if arguments.list:
        for case in cases:
            print(f"{case.name}{' (reference)' if case.is_reference else ''}")
        return
    check_output(arguments.output)
    check_gpu(cases)
    record = measure(cases, QUICK_REPLAYS if arguments.quick else REPLAYS)
    complete = not record.get("cases_not_timed")
    whole = complete and not (arguments.filter or arguments.tokens or arguments.quick) and arguments.model == "both"
    output = arguments.output or (default_output(record["gpu"]["name"]) if whole else None)
    if output is not None:
        from benchmarks.record import write

        write(output, record)
    failed = [f"{row['op']} {row['case']}" for row in record["rows"] if "error" in row]
    if failed:
        from model.errors import UserError

        raise UserError(f"{len(failed)} of {len(cases)} cases failed: {', '.join(failed)}")


def run_view(arguments: argparse.Namespace) -> None:
    from model.errors import UserError

    if arguments.filter or arguments.tokens or arguments.list or arguments.model != "both":
        raise UserError(f"dsv4 bench {arguments.view} takes --quick and --output alone")
    check_output(arguments.output)
    check_gpu([])
    import torch

    output = arguments.output
    if output is None and not arguments.quick:
        output = default_output(torch.cuda.get_device_name(), arguments.view)
    view = importlib.import_module(f"benchmarks.{arguments.view}_gpu")
    view.run(QUICK_REPLAYS if arguments.quick else REPLAYS, output)


def select(arguments: argparse.Namespace) -> "list[Case]":
    """The cases that the arguments ask for."""
    from benchmarks.cases import all_cases
    from benchmarks.shapes import MODELS
    from model.errors import UserError

    tokens = None if arguments.tokens is None else parse_tokens(arguments.tokens)
    cases = all_cases(MODELS[arguments.model], tokens)
    if arguments.filter is None:
        return [case for case in cases if arguments.list or not case.is_reference]
    try:
        pattern = re.compile(arguments.filter)
    except re.error as error:
        raise UserError(f"--filter {arguments.filter!r} is not a regular expression: {error}") from None
    chosen = [case for case in cases if pattern.search(case.name)]
    if not chosen:
        raise UserError(f"--filter {arguments.filter!r} matches no case; `dsv4 bench --list` shows them")
    return chosen


def parse_tokens(text: str) -> tuple[int, ...]:
    from benchmarks.shapes import FLASH
    from model.errors import UserError

    try:
        tokens = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        tokens = ()
    if not tokens or not 1 <= min(tokens) <= max(tokens) <= FLASH.context:
        raise UserError(f"--tokens wants numbers from 1 to {FLASH.context}, comma separated, got {text!r}")
    return tokens


def check_gpu(cases: "list[Case]") -> None:
    """Raise unless the cases can be timed here."""
    import torch

    from model.errors import UserError

    if not torch.cuda.is_available():
        found = f"is built for CUDA {torch.version.cuda} and sees none" if torch.version.cuda else "is a CPU build"
        hint = "`dsv4 bench --list` shows what would be timed"
        raise UserError(f"dsv4 bench needs an NVIDIA GPU: torch {torch.__version__} {found}; {hint}")
    if not all(case.is_reference for case in cases):
        from dsv4_ops.kernels import require_kernels

        require_kernels()


def check_output(path: Path | None) -> None:
    """What would go wrong after minutes of measuring goes wrong now."""
    from model.errors import UserError

    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{path} is a directory; --output names the file to write")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path.absolute().parent} is not a directory; make it first")


def default_output(gpu: str, what: str = "ops") -> Path | None:
    """The result file of this GPU in a checkout; None where the package is installed."""
    if not (PACKAGE.parent / "pyproject.toml").is_file():
        return None
    name = gpu.lower().removeprefix("nvidia ").split()[0]
    return PACKAGE / "results" / f"{what}_{name}.json"


def measure(cases: "list[Case]", replays: int) -> dict[str, Any]:
    """Time the cases one after another, print each when it is done, return the record; an interrupt ends it early."""
    from dataclasses import asdict

    import torch

    from benchmarks.floors import H200, measure_ceilings
    from benchmarks.record import gpu_header
    from benchmarks.result import text_lines
    from benchmarks.timing import Timer

    timer = Timer(replays)
    measured = measure_ceilings(lambda call: timer.warm(call)[0])
    torch.cuda.empty_cache()
    record = gpu_header()
    ceilings = H200 if "H200" in record["gpu"]["name"] else measured
    record |= {"replays": replays, "ceilings": asdict(ceilings), "measured_ceilings": asdict(measured), "rows": []}
    print(
        f"{record['gpu']['name']}: copies {measured.copy / 1e12:.2f} TB/s, reads {measured.read_only / 1e12:.2f} TB/s;"
        f" floors by {ceilings.copy / 1e12:.2f} and {ceilings.read_only / 1e12:.2f}"
    )
    rows = rows_of(cases, timer, ceilings, measured, record["rows"])
    try:
        for line in text_lines(rows, width=max(len(case.name) for case in cases) + len(" (reference)")):
            print(line, flush=True)
    except KeyboardInterrupt:
        print(f"stopped after {len(record['rows'])} of {len(cases)} cases")
    record["cases_not_timed"] = len(cases) - len(record["rows"])
    return record


def rows_of(cases: "list[Case]", timer, ceilings, measured, rows: list[dict]) -> Iterator[dict]:
    """Append the row of each case to `rows`, and yield it."""
    import torch

    from benchmarks.call import timed
    from benchmarks.result import failure, result

    for case in cases:
        try:
            torch.cuda.empty_cache()
            rows.append(result(case, timed(case, timer), ceilings, measured))
        except (RuntimeError, ValueError) as error:  # the others may still be timed
            rows.append(failure(case, error))
        yield rows[-1]
