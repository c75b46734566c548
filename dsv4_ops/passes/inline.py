"""Replace an op by its reference where the device has no kernel, so that Inductor fuses it with its neighbours.

On the CPU no op has a kernel of its own; those marked `inline` (element-wise, short reductions) are opened up, the
others (products, attention, selection) stay calls of their reference. On CUDA nothing is replaced: a missing kernel is
an error.
"""

from collections import Counter
from functools import cache

import torch
from torch._inductor.pattern_matcher import CallFunctionVarArgs, PatternMatcherPass, register_graph_pattern

from dsv4_ops.registry import TABLE


@cache
def _inliner() -> PatternMatcherPass:
    passes = PatternMatcherPass("dsv4_inline")
    references = {op.overload: op.reference for op in TABLE.values() if op.inline}

    @register_graph_pattern(CallFunctionVarArgs(list(references)), extra_check=_on_cpu, pass_dict=passes)
    def replace(match, *args, **kwargs):
        (node,) = match.nodes
        match.replace_by_example(references[node.target], list(args))

    return passes


def inline_references(graph: torch.fx.Graph) -> Counter:
    return Counter({"inlined": _inliner().apply(graph)})


def _on_cpu(match) -> bool:
    value = match.nodes[0].meta["val"]
    value = value[0] if isinstance(value, tuple | list) else value
    return value.device.type == "cpu"
