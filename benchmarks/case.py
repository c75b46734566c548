"""One operator at one shape: its inputs, what it must move, and which of the peers' kernels do the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.floors import Traffic
from benchmarks.inputs import Inputs
from benchmarks.peers import Chain
from dsv4_ops.registry import TABLE, Cuda, Op


@dataclass(frozen=True)
class Case:
    """make      the operator's arguments on the device of `Inputs`
    peers     alternatives; each is a chain of kernels that run one after another
    """

    op_name: str
    tokens: int
    shape: str  # the widths that matter, "dim 4096"
    traffic: Traffic
    make: Callable[[Inputs], tuple]
    peers: Sequence[Chain] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        return f"{self.op_name} {self.label}"

    @property
    def label(self) -> str:
        return f"T={self.tokens} {self.shape}"

    @property
    def op(self) -> Op:
        return TABLE[self.op_name]

    @property
    def is_reference(self) -> bool:
        """On CUDA this operator runs its reference."""
        return self.op.cuda is Cuda.REFERENCE
