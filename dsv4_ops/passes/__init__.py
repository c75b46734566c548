"""Graph passes on the functional post-grad graph: fuse pairs of our ops, then open up ops without a kernel."""

from collections import Counter
from pathlib import Path

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from dsv4_ops.passes.fuse import fuse
from dsv4_ops.passes.inline import inline_references

SOURCES = tuple(str(path) for path in sorted(Path(__file__).parents[1].rglob("*.py")))


class GraphPasses(CustomGraphPass):
    """Callable that Inductor runs on every graph; `matches` of the class counts what each rule did, for tests.

    Inductor does not run passes on a graph that it finds in its cache; the uuid covers every source file that decides
    the result.
    """

    matches: Counter = Counter()

    def __call__(self, graph: torch.fx.Graph) -> None:
        counts = fuse(graph)
        counts.update(inline_references(graph))
        graph.eliminate_dead_code()
        graph.lint()
        GraphPasses.matches.update(counts)

    def uuid(self) -> bytes:
        return get_hash_for_files(SOURCES)
