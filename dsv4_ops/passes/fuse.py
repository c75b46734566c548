"""Rewrite neighbouring dsv4 ops into their fused op.

The rules match our own nodes, so they do not depend on how torch decomposes anything. A fused op's reference is the
literal composition of its parts: rewriting changes no bit. Later rules see what earlier ones made, so

    hc_post, hc_pre, rms_norm, quant_fp8  ->  hc_post, hc_pre_rms_norm, quant_fp8
                                          ->  hc_post_pre_rms_norm, quant_fp8  ->  hc_post_pre_rms_norm_quant_fp8
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
    """`consumer(producer(*a), *b)` becomes `fused(*a, *b)`; of an op with several results the consumer reads `y`.

    keeps_producer: the fused op first returns what the producer did, so that may have other users.
    """

    producer: str
    consumer: str
    fused: str
    keeps_producer: bool = True


# The norm of hc_pre's y, which the fused op returns in its place.
NORMED_STREAMS = (Rule("hc_pre", "rms_norm", "hc_pre_rms_norm", False),)
# Across the boundary of two sub-layers.
BOUNDARIES = tuple(
    Rule("hc_post", consumer, consumer.replace("hc_", "hc_post_")) for consumer in ("hc_pre_rms_norm", "hc_pre")
)
NORMS = ("rms_norm", "hc_pre_rms_norm", "hc_post_pre_rms_norm")
PAIRS = (
    *(Rule(norm, "quant_fp8", f"{norm}_quant_fp8") for norm in NORMS),
    Rule("rms_norm", "quant_mxfp4", "rms_norm_quant_mxfp4"),
    Rule("swiglu", "quant_fp8", "swiglu_quant_fp8", False),
    Rule("swiglu", "quant_mxfp4", "swiglu_quant_mxfp4", False),
)
# NVFP4 needs the row scale between norm and quantiser: quant_nvfp4(y, nvfp4_row_scale(y)).
ROW_SCALED = (
    *(Rule(norm, "quant_nvfp4", f"{norm}_quant_nvfp4") for norm in NORMS),
    Rule("swiglu", "quant_nvfp4", "swiglu_quant_nvfp4", False),
)

# Attention's first result, which grouped products see as groups of heads.
ATTENTION_OUTPUTS = tuple(
    Rule(f"sparse_attention_{kind}", "quant_fp8", f"sparse_attention_{kind}_quant_fp8", False)
    for kind in ("window", "selected", "compressed")
)
ATTENTION_GROUP = 128  # of the fused ops
VIEW = torch.ops.aten.view.default


def fuse(graph: Graph) -> Counter:
    """Apply every rule until none matches; returns how often each fused op was made."""
    counts = Counter()
    for rules, rewrite in (
        (NORMED_STREAMS, _fuse_normed_streams),
        (BOUNDARIES, _fuse_pair),
        (PAIRS, _fuse_pair),
        (ROW_SCALED, _fuse_row_scaled),
        (ATTENTION_OUTPUTS, _fuse_attention_output),
    ):
        for rule in rules:
            for node in list(graph.nodes):
                if _is(node, rule.consumer) and rewrite(graph, rule, node):
                    counts[rule.fused] += 1
    return counts


def _fuse_pair(graph: Graph, rule: Rule, consumer: Node) -> bool:
    y, *others = consumer.args
    producer = _producer(rule, y)
    if producer is None or not (rule.keeps_producer or len(y.users) == 1):
        return False
    if not _computed_before(graph, others, producer):
        return False
    results = _insert(graph, rule.fused, producer, (*producer.args, *others))
    _replace_results(consumer, results, offset=_keep_results(rule, producer, results))
    _erase(graph, consumer, producer)
    return True


def _fuse_row_scaled(graph: Graph, rule: Rule, consumer: Node) -> bool:
    y, scale = consumer.args
    producer = _producer(rule, y)
    if producer is None or not (_is(scale, "nvfp4_row_scale") and scale.args[0] is y):
        return False
    if not rule.keeps_producer and set(y.users) != {scale, consumer}:
        return False
    results = _insert(graph, rule.fused, producer, producer.args)
    first = _keep_results(rule, producer, results)
    scale.replace_all_uses_with(results(first + 2))
    _replace_results(consumer, results, offset=first)
    _erase(graph, consumer, scale, producer)
    return True


def _fuse_normed_streams(graph: Graph, rule: Rule, consumer: Node) -> bool:
    """hc_pre(x, fn, scale, base, norm_eps, ...) -> y, post, comb, and rms_norm(y, weight, eps): y is read by nothing
    else, and the fused op has one eps for both."""
    y, weight, eps = consumer.args
    producer = _producer(rule, y)
    if producer is None:
        return False
    mix, scalars = producer.args[:4], producer.args[4:]
    others = [user for user in producer.users if _is_result(user, 0) and user is not y]
    if others or len(y.users) > 1 or eps != scalars[0] or not _computed_before(graph, (weight,), producer):
        return False
    results = _insert(graph, rule.fused, producer, (*mix, weight, *scalars))
    consumer.replace_all_uses_with(results(0))
    _erase(graph, consumer, y)
    _replace_results(producer, results, offset=0)
    _erase(graph, producer)
    return True


def _producer(rule: Rule, y) -> Node | None:
    """The call of the rule's producer of which `y` is the result, or its result y."""
    outputs = TABLE[rule.producer].outputs
    if len(outputs) > 1:
        y = y.args[0] if _is_result(y, outputs.index("y")) else None
    return y if _is(y, rule.producer) else None


def _keep_results(rule: Rule, producer: Node, results: Callable[[int], Node]) -> int:
    """Let the fused op return what the producer did, if it does; how many results that are."""
    outputs = len(TABLE[rule.producer].outputs) if rule.keeps_producer else 0
    if outputs == 1:
        producer.replace_all_uses_with(results(0))
    elif outputs:
        _replace_results(producer, results, offset=0)
    return outputs


def _fuse_attention_output(graph: Graph, rule: Rule, consumer: Node) -> bool:
    """sparse_attention_*(...) -> o, lse and quant_fp8(o, 128) or of views of o, which nothing else reads. A group lies
    in a head, so codes and scales are those of the fused op, viewed likewise."""
    source, group = consumer.args
    views = []
    while source.target is VIEW:
        views.append(source)
        source = source.args[0]
    producer = source.args[0] if _is_result(source, 0) else None
    if not _is(producer, rule.producer) or group != ATTENTION_GROUP:
        return False
    widths = [node.meta["val"].shape[-1] for node in (source, consumer.args[0])]
    if not all(isinstance(width, int) and width % group == 0 for width in widths):
        return False
    alone = [user for user in producer.users if _is_result(user, 0)] == [source]
    if not alone or any(len(node.users) > 1 for node in (source, *views)):
        return False
    results = _insert(graph, rule.fused, producer, producer.args)
    for user in list(consumer.users):
        result, value = results(user.args[1]), user.meta["val"]
        if views:
            with graph.inserting_before(user):
                result = graph.call_function(VIEW, (result, [*views[0].args[1][:-1], value.shape[-1]]))
            result.meta["val"] = value
        user.replace_all_uses_with(result)
    _erase(graph, consumer, *views, source)
    _replace_results(producer, results, offset=1)
    _erase(graph, producer)
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


def _erase(graph: Graph, *nodes: Node) -> None:
    """Remove nodes, in this order, with their results: a dead user would stop the next rule."""
    for node in nodes:
        for user in list(node.users):
            if user.target is operator.getitem and not user.users:
                graph.erase_node(user)
        if not node.users:
            graph.erase_node(node)


def _computed_before(graph: Graph, arguments, node: Node) -> bool:
    """Whether the graph has every argument when it comes to `node`."""
    missing = {argument for argument in arguments if isinstance(argument, Node)}
    for other in graph.nodes:
        if other is node:
            break
        missing.discard(other)
    return not missing


def _is_result(node, index: int) -> bool:
    return isinstance(node, Node) and node.target is operator.getitem and node.args[1] == index


def _is(node, name: str) -> bool:
    return isinstance(node, Node) and name in TABLE and node.target is TABLE[name].overload
