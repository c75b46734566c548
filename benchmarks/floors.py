"""The least time an operator can take: what it must move, over what the memory does, or its flops over the units' rate.

One rule for memory: a byte that is written goes with a byte that is read, at the speed of a copy; what is read beyond
that goes at the speed of reading alone, what is written beyond that at the speed of a copy.

    time = 2 * min(read, written) / copy + max(read - written, 0) / read_only + max(written - read, 0) / copy

Every input is read once and every output written once. Of tables, pools and states only what is touched counts.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

LAUNCH_US = 0.7  # an empty kernel in a graph behind another one, with programmatic dependent launch, on an H200


@dataclass(frozen=True)
class Traffic:
    """Bytes that an operator must read and write, and its multiplications and additions."""

    read: int
    written: int
    fp8_flops: int = 0  # of matrix products whose operands are exact in FP8
    bf16_flops: int = 0  # of those whose operands are exact in bf16, or sums of bf16 parts
    fp32_flops: int = 0  # of what has to keep fp32

    @property
    def flops(self) -> int:
        return self.fp8_flops + self.bf16_flops + self.fp32_flops

    def __add__(self, other: "Traffic") -> "Traffic":
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return Traffic(*(mine + its for mine, its in pairs))


@dataclass(frozen=True)
class Ceilings:
    """What a GPU does: bytes a second of a copy (read and written together) and of reading alone, flops a second."""

    copy: float
    read_only: float
    fp8: float = 1300e12
    bf16: float = 790e12
    fp32: float = 60e12


H200 = Ceilings(copy=4.3e12, read_only=4.7e12)  # measured 2026-11-22, see benchmarks/peers.json


@dataclass(frozen=True)
class Floor:
    us: float
    bound: str  # "memory" | "fp8" | "bf16" | "fp32": what takes the longest

    @property
    def is_latency(self) -> bool:
        """The launch takes longer than the work."""
        return self.us < LAUNCH_US


def floor(traffic: Traffic, ceilings: Ceilings) -> Floor:
    paired = min(traffic.read, traffic.written)
    more_read, more_written = traffic.read - paired, traffic.written - paired
    seconds = {
        "memory": (2 * paired + more_written) / ceilings.copy + more_read / ceilings.read_only,
        "fp8": traffic.fp8_flops / ceilings.fp8,
        "bf16": traffic.bf16_flops / ceilings.bf16,
        "fp32": traffic.fp32_flops / ceilings.fp32,
    }
    bound = max(seconds, key=seconds.__getitem__)
    return Floor(1e6 * seconds[bound], bound)


def measure_ceilings(time_us: Callable[[Callable[[], object]], float]) -> Ceilings:
    """Copy and read-only bandwidth of this GPU, by torch's kernels over a GiB; `time_us` times a call.

    abs and not copy_, which in a graph becomes a memory copy node: not what a kernel reaches.
    """
    import torch

    size = 1 << 28
    source = torch.randn(size, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / time_us(lambda: torch.abs(source, out=target))
    rows = source.view(1 << 14, -1)
    read_only = source.nbytes / min(time_us(source.sum), time_us(lambda: rows.sum(1)))
    return Ceilings(copy=1e6 * copy, read_only=1e6 * read_only)
