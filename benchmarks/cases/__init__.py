"""Cases of every operator, one file a family as in dsv4_ops/ops: inputs, what they move, the peers' counterparts.

Two models often have one case in common: the name of a case tells all that it depends on. A family that is timed at
other numbers of tokens than the rest has them as `TOKENS`.
"""

from collections.abc import Iterable

from benchmarks.case import Case
from benchmarks.cases import (
    attention,
    compressor,
    fused_quant,
    gemm,
    hyper_connection,
    indexer,
    moe,
    norm,
    nvfp4,
    quant,
    router,
    sampling,
)
from benchmarks.shapes import TOKENS, Widths

FAMILIES = (
    quant,
    nvfp4,
    fused_quant,
    norm,
    hyper_connection,
    compressor,
    indexer,
    attention,
    gemm,
    router,
    moe,
    sampling,
)


def all_cases(models: Iterable[Widths], tokens: Iterable[int] | None = None) -> list[Case]:
    """Every case of these models and numbers of tokens (default: those of each family), once, operator by operator."""
    models, tokens = tuple(models), None if tokens is None else tuple(tokens)
    found: dict[str, Case] = {}
    for family in FAMILIES:
        counts = getattr(family, "TOKENS", TOKENS) if tokens is None else tokens
        of_family = [case for w in models for count in counts for case in family.cases(w, count)]
        operators = list(dict.fromkeys(case.op_name for case in of_family))
        for case in sorted(of_family, key=lambda case: operators.index(case.op_name)):
            found.setdefault(case.name, case)
    return list(found.values())
