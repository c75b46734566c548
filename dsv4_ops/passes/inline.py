"""Replace an op by its reference where the device has no kernel, so that Inductor fuses it with its neighbours.

On the CPU no op has a kernel of its own; those that their definition marks are opened up, the others stay calls of
their reference. On CUDA nothing is replaced: a missing kernel is an error.
"""

from collections import Counter
from functools import cache

import torch
from torch._inductor.pattern_matcher import CallFunctionVarArgs, PatternMatcherPass, register_graph_pattern
from torch.utils._pytree import tree_leaves

from dsv4_ops.registry import TABLE, Inline


@cache
def _inliner() -> PatternMatcherPass:
    passes = PatternMatcherPass("dsv4_inline")
    references = {op.overload: op.reference for op in TABLE.values() if op.inline is not Inline.NEVER}
    needs_sizes = {op.overload for op in TABLE.values() if op.inline is Inline.STATIC_SHAPES}

    def may_inline(match) -> bool:
        (node,) = match.nodes
        results = tree_leaves(node.meta["val"])
        sizes_known = all(isinstance(size, int) for result in results for size in result.shape)
        return results[0].device.type == "cpu" and (sizes_known or node.target not in needs_sizes)

    @register_graph_pattern(CallFunctionVarArgs(list(references)), extra_check=may_inline, pass_dict=passes)
    def replace(match, *args, **kwargs):
        (node,) = match.nodes
        match.replace_by_example(references[node.target], list(args))

    return passes


def inline_references(graph: torch.fx.Graph) -> Counter:
    return Counter({"inlined": _inliner().apply(graph)})
