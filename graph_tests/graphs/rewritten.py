"""Backends for graph tests: run the graph that our passes leave with eager kernels, and keep it for inspection."""

from collections import Counter

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from dsv4_ops.passes.fuse import fuse
from dsv4_ops.registry import NAMESPACE


class FusedThenEager:
    """AOTAutograd's functional graph, our fusions, eager kernels: any difference from eager is a pass's fault."""

    def __init__(self, fusing: bool = True):
        self.fusing = fusing
        self.graphs: list[torch.fx.GraphModule] = []
        self.matches: Counter = Counter()
        self.backend = aot_autograd(
            fw_compiler=self._compile, inference_compiler=self._compile, keep_inference_input_mutations=True
        )

    def _compile(self, gm: torch.fx.GraphModule, example_inputs):
        if self.fusing:
            self.matches.update(fuse(gm.graph))
            gm.graph.eliminate_dead_code()
            gm.graph.lint()
            gm.recompile()
        self.graphs.append(gm)
        return make_boxed_func(gm.forward)

    def __call__(self, gm, example_inputs):
        return self.backend(gm, example_inputs)


def operators(gm: torch.fx.GraphModule) -> list[str]:
    """Our operators in graph order; a mutating one stands in the graph as auto_functionalized(op)."""
    names = []
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        wrapped = node.args[0] if "auto_functionalized" in str(node.target) else node.target
        if str(wrapped).startswith(f"{NAMESPACE}."):
            names.append(str(wrapped).split(".")[1])
    return names


def aten_operators(gm: torch.fx.GraphModule) -> Counter:
    """How often each ATen operator appears."""
    targets = (str(node.target) for node in gm.graph.nodes if node.op == "call_function")
    return Counter(target.split(".")[1] for target in targets if target.startswith("aten."))
