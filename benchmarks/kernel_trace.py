"""Which operator launched which kernels, and how long they ran, from events of torch.profiler."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.autograd import DeviceType

OUTSIDE = "between operators"
COPY = re.compile(r"^Mem(cpy|set)")
FAMILIES = (  # of kernels, by their demangled names; the first that matches
    (re.compile(r"dsv4::.*?(\w+)_kernel\b"), r"\1"),
    (re.compile(r"^triton_"), "Inductor"),
    (re.compile(r"gemm|gemv|cutlass|cublas|nvjet|splitk", re.IGNORECASE), "library products"),
    (COPY, "copies"),
    (re.compile(r"at::|cub::|thrust::"), "torch"),
)


class Launch(Protocol):
    """A kernel as the profiler attaches it to what launched it."""

    name: str
    duration: float  # us


class Event(Protocol):
    """Something on the host: an operator, a range, a call of the runtime."""

    name: str
    cpu_parent: "Event | None"
    cpu_children: "list[Event]"
    kernels: list[Launch]


@dataclass
class Share:
    us: float = 0.0
    kernels: int = 0

    def add(self, us: float) -> None:
        self.us += us
        self.kernels += 1


def launches(event: Event) -> Iterator[Launch]:
    """The kernels that an event launched, itself or through others."""
    yield from event.kernels
    for child in event.cpu_children:
        yield from launches(child)


def count_kernels(names: Iterable[str]) -> int:
    """How many of these are kernels, and not copies."""
    return sum(COPY.match(name) is None for name in names)


def outermost(events: Iterable[Event], prefix: str) -> Iterator[Event]:
    """Events whose name starts with `prefix` and that are inside of no other such event."""
    for event in events:
        parent = event.cpu_parent
        while parent is not None and not parent.name.startswith(prefix):
            parent = parent.cpu_parent
        if parent is None and event.name.startswith(prefix):
            yield event


def shares_of_operators(events: list[Event], steps: int = 1) -> dict[str, Share]:
    """GPU time and kernels of each operator `dsv4::name` in a step, and of what runs between them."""
    shares: dict[str, Share] = defaultdict(Share)
    for event in events:
        if event.cpu_parent is None:
            for launch in launches(event):
                shares[OUTSIDE].add(launch.duration)
    for event in outermost(events, "dsv4::"):
        for launch in launches(event):
            shares[event.name.removeprefix("dsv4::")].add(launch.duration)
            shares[OUTSIDE].us -= launch.duration
            shares[OUTSIDE].kernels -= 1
    return per_step(shares, steps)


def shares_of_families(kernels: Iterable[tuple[str, float]], steps: int = 1) -> dict[str, Share]:
    """GPU time and kernels of each family in a step; `kernels` are names and us."""
    shares: dict[str, Share] = defaultdict(Share)
    for name, us in kernels:
        shares[family(name)].add(us)
    return per_step(shares, steps)


def per_step(shares: dict[str, Share], steps: int) -> dict[str, Share]:
    """Largest first."""
    ordered = sorted(shares.items(), key=lambda item: -item[1].us)
    return {name: Share(share.us / steps, round(share.kernels / steps)) for name, share in ordered if share.kernels}


def family(kernel: str) -> str:
    """Of a kernel of this project its name, of others the library that it comes from."""
    for pattern, name in FAMILIES:
        if match := pattern.search(kernel):
            return match.expand(name)
    return "other"


def trace(step: Callable[[], object], steps: int) -> tuple[list[Event], list[tuple[str, float]]]:
    """Run some steps under the profiler: host events, and names and us of all kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    host, kernels = [], []
    for event in profile.events():
        if event.device_type == DeviceType.CPU:
            host.append(event)
        elif not event.is_user_annotation:
            kernels.append((event.name, event.time_range.elapsed_us()))
    return host, kernels
