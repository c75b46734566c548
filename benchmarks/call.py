"""From a case to something that can be timed: its inputs, checked once."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.case import Case
from benchmarks.inputs import Inputs
from benchmarks.streams import is_streamed, stream
from benchmarks.timing import Timer, Times
from dsv4_ops.registry import Op

POISON = 0xFF  # as bf16, fp32 and E4M3 a NaN


def prepare(case: Case, device: str | torch.device) -> list[Callable[[], object]]:
    """Calls of the case's operator on inputs of their own: a stream of them if it is timed so, else one.

    RuntimeError if an output of the first is not finite or not written.
    """
    arguments = case.make(Inputs(device))
    check_finite(case.op, arguments)
    return stream(case, arguments) if is_streamed(case) else [lambda: case.op.overload(*arguments)]


def timed(case: Case, timer: Timer) -> Times:
    """What a call takes on the current GPU. What was allocated for it is free when this returns."""
    calls = prepare(case, "cuda")
    times = timer.times(calls[0])
    return replace(times, streamed=timer.streamed(calls)) if is_streamed(case) else times


def check_finite(op: Op, arguments: tuple) -> None:
    """Run the operator on outputs full of NaN: inputs are finite, so every number of an output must be, too.

    An operator that updates state runs on the state itself, of which the fp32 parts are looked at.
    """
    if op.alloc is None:
        op.overload(*arguments)
        schema = op.overload._schema.arguments
        results = {a.name: tensor for a, tensor in zip(schema, arguments, strict=True) if a.is_write}
    else:
        allocated = op.alloc(*arguments)
        allocated = allocated if isinstance(allocated, tuple) else (allocated,)
        results = dict(zip(op.outputs, allocated, strict=True))
        for tensor in allocated:
            tensor.view(torch.uint8).fill_(POISON)
        more = {} if op.workspace is None else {"workspace": op.workspace(*arguments)}
        op.packet.out(*arguments, **results, **more)
    wrong = [name for name, tensor in results.items() if not is_finite(tensor)]
    if wrong:
        raise RuntimeError(f"dsv4::{op.name}: {', '.join(wrong)} not finite, or not written")


def is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    return bool(tensor.float().isfinite().all())
