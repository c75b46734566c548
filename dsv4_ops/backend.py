"""torch.compile(model, backend="dsv4"): Inductor with the project's graph passes.

Found through the entry point group `torch_dynamo_backends`, so nobody needs to import this package first. `mode` and
`options` mean what they mean for the default backend.
"""

import torch
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
from torch._library.utils import get_layout_constraint_tag

from dsv4_ops.passes import GraphPasses
from dsv4_ops.registry import TABLE

HOOK = "post_grad_custom_pre_pass"  # functional graph, before Inductor's own post-grad passes


def dsv4(gm: torch.fx.GraphModule, example_inputs, *, mode: str | None = None, options: dict | None = None):
    """Compile one graph. Raises if `options` carry a pass of their own for the hook that ours use."""
    options = {key.replace("-", "_"): value for key, value in (options or {}).items()}
    if options.get(HOOK) is not None:
        raise ValueError(
            f"backend 'dsv4' uses Inductor's {HOOK} itself; use post_grad_custom_post_pass for your own pass"
        )
    lower_to_calls()
    patches = {
        HOOK: GraphPasses(),
        # Else Inductor drops the bf16 roundings inside a fused kernel, and quantisers see other values than eager.
        "emulate_precision_casts": True,
        **(list_mode_options(mode) if mode else {}),
        **options,
    }
    return compile_fx(gm, example_inputs, config_patches=patches)


def lower_to_calls() -> None:
    """Register a fallback for every op, with the layout that Inductor itself would ask for.

    Inductor also makes one when it meets an op that it does not know. But that of torch 2.11 first spells out, for a
    log line, the expressions behind each argument, whether the line is shown or not. Those of the residual streams
    multiply from one mixing to the next: a step of two layers then compiles for more than four minutes.
    """
    for op in TABLE.values():
        overloads = [op.overload] if op.alloc is None else [op.overload, op.packet.out]
        for overload in overloads:
            if overload not in lowerings:
                constraint = tag_to_layout_constraint(get_layout_constraint_tag(overload, with_default=True))
                make_fallback(overload, layout_constraint=constraint, warn=False)
