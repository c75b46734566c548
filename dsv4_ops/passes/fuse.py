"""Rewrite pairs of neighbouring dsv4 ops into their fused op.

The rules match our own nodes, so they do not depend on how torch decomposes anything. A fused op's reference is the
literal composition of its parts: rewriting changes no bit.
"""

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from dsv4_ops.registry import TABLE


@dataclass(frozen=True)
class Rule:
    """`consumer(producer(*a), *b)` becomes `fused(*a, *b)`.

    keeps_producer: the fused op also returns the producer's result, so that may have other users.
    """

    producer: str
    consumer: str
    fused: str
    keeps_producer: bool


RULES = (
    Rule("rms_norm", "quant_fp8", "rms_norm_quant_fp8", True),
    Rule("rms_norm", "quant_mxfp4", "rms_norm_quant_mxfp4", True),
    Rule("swiglu", "quant_fp8", "swiglu_quant_fp8", False),
    Rule("swiglu", "quant_mxfp4", "swiglu_quant_mxfp4", False),
)
# NVFP4 needs the row scale between norm and quantiser: quant_nvfp4(y, nvfp4_row_scale(y)).
ROW_SCALED_RULES = (
    Rule("rms_norm", "quant_nvfp4", "rms_norm_quant_nvfp4", True),
    Rule("swiglu", "quant_nvfp4", "swiglu_quant_nvfp4", False),
)


def fuse(graph: Graph) -> Counter:
    """Apply every rule until none matches; returns how often each fused op was made."""
    counts = Counter()
    for rules, rewrite in ((RULES, _fuse_pair), (ROW_SCALED_RULES, _fuse_row_scaled)):
        for rule in rules:
            for node in list(graph.nodes):
                if _is(node, rule.consumer) and rewrite(graph, rule, node):
                    counts[rule.fused] += 1
    return counts


def _fuse_pair(graph: Graph, rule: Rule, consumer: Node) -> bool:
    producer = consumer.args[0]
    if not _is(producer, rule.producer) or not (rule.keeps_producer or len(producer.users) == 1):
        return False
    arguments = (*producer.args, *consumer.args[1:])
    results = _insert(graph, rule.fused, producer, arguments)
    if rule.keeps_producer:
        producer.replace_all_uses_with(results(0))
    _replace_results(consumer, results, offset=int(rule.keeps_producer))
    return True


def _fuse_row_scaled(graph: Graph, rule: Rule, consumer: Node) -> bool:
    producer, scale = consumer.args
    if not (_is(producer, rule.producer) and _is(scale, "nvfp4_row_scale") and scale.args[0] is producer):
        return False
    if not rule.keeps_producer and set(producer.users) != {scale, consumer}:
        return False
    results = _insert(graph, rule.fused, producer, producer.args)
    first = int(rule.keeps_producer)
    if rule.keeps_producer:
        producer.replace_all_uses_with(results(0))
    scale.replace_all_uses_with(results(first + 2))
    _replace_results(consumer, results, offset=first)
    return True


def _insert(graph: Graph, fused: str, before: Node, arguments: tuple) -> Callable[[int], Node]:
    """Call `fused` where `before` stands; returns a function that makes the node of its i-th result."""
    op = TABLE[fused]
    with graph.inserting_before(before):
        node = graph.call_function(op.overload, arguments)
        node.meta["val"] = op.alloc(*torch.fx.node.map_arg(arguments, lambda argument: argument.meta["val"]))

    def result(index: int) -> Node:
        with graph.inserting_after(node):
            item = graph.call_function(operator.getitem, (node, index))
        item.meta["val"] = node.meta["val"][index]
        return item

    return result


def _replace_results(consumer: Node, results: Callable[[int], Node], offset: int) -> None:
    """Point the users of a multi-output op (all of them getitem nodes) at the results of the fused op."""
    for user in list(consumer.users):
        user.replace_all_uses_with(results(user.args[1] + offset))


def _is(node, name: str) -> bool:
    return isinstance(node, Node) and name in TABLE and node.target is TABLE[name].overload
