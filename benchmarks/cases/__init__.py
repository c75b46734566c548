"""Cases of every operator, one file a family as in dsv4_ops/ops: inputs, what they move, the peers' counterparts.

Two models often have one case in common: the name of a case tells all that it depends on.
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
from benchmarks.shapes import Widths

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


def all_cases(models: Iterable[Widths], tokens: Iterable[int]) -> list[Case]:
    """Every case of these models and numbers of tokens, once, operator by operator."""
    models, tokens = tuple(models), tuple(tokens)
    found: dict[str, Case] = {}
    for family in FAMILIES:
        of_family = [case for w in models for count in tokens for case in family.cases(w, count)]
        operators = list(dict.fromkeys(case.op_name for case in of_family))
        for case in sorted(of_family, key=lambda case: operators.index(case.op_name)):
            found.setdefault(case.name, case)
    return list(found.values())
