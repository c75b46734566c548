"""Calls of a product that read weights of their own, as those of a decode step do: what `Timer.streamed` times.

All calls together read several times what L2 holds, so that each finds its weights in memory only, and L2 full of other
calls' weights, which need not be written back.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.case import Case
from benchmarks.targets import COLD_TARGETS

BYTES = 512 << 20  # that the calls read at least: eight times the L2 of an H200, as torch reports it, and more
MOST_CALLS = 96
MOST_TOKENS = 64
OTHER_PRODUCTS = ("indexer q_b", "shared w1 + w3", "shared w2")  # of FP8, beside those that have a target


def is_streamed(case: Case) -> bool:
    """Whether `dsv4 bench` times the case in a stream: products and experts of decode that the README is about."""
    product = case.op_name == "linear_fp8" and case.shape.startswith(OTHER_PRODUCTS)
    return case.tokens <= MOST_TOKENS and (product or case.name in COLD_TARGETS)


def stream(case: Case, arguments: tuple) -> list[Callable[[], object]]:
    """Calls one of which has these arguments; the others have weights of their own, or read other experts."""
    count = min(MOST_CALLS, -(-BYTES // case.traffic.read))
    change = other_experts if case.op_name.startswith("moe_") else own_copy
    each = [arguments, *(change(arguments, number) for number in range(1, count))]
    return [lambda own=own: case.op.overload(*own) for own in each]


def own_copy(arguments: tuple, number: int) -> tuple:
    return tuple(part.clone() if isinstance(part, Tensor) else part for part in arguments)


def other_experts(arguments: tuple, number: int) -> tuple:
    """The same experts in memory, of which call `number` takes those that come after what call `number - 1` takes."""
    place = next(at for at, part in enumerate(arguments) if isinstance(part, Tensor) and part.dtype == torch.int32)
    ids = arguments[place]
    held = arguments[place + 2].shape[0]  # behind ids and weights: w1
    taken = ids.unique().numel()
    return *arguments[:place], (ids + number * taken) % held, *arguments[place + 1 :]
