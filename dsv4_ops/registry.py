"""The op table: one call of `define` (or `define_mutating`) makes a `torch.library` operator out of its parts.

A functional op is written down once, as a schema, an `alloc` that creates its outputs, and a `reference` that says what
it computes. From these `define` derives

  dsv4::foo        functional overload; on CPU tensors the reference is the kernel
  dsv4::foo.out    the overload that a CUDA kernel implements: it never allocates and knows no shapes
  fake kernels     of both, from `alloc`, so fake and real cannot disagree

There is no fallback on other devices: an op without a kernel for its tensors' device raises `MissingKernelError`. What
an op runs on CUDA stands in its definition (`Cuda`), it is never decided by a call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

NAMESPACE = "dsv4"
REMEMBERED_SIGNATURES = 1024  # of one op
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


class Inline(Enum):
    """Whether a graph pass may replace an op by its reference where the device has no kernel."""

    NEVER = 0
    ALWAYS = 1  # element-wise or a short reduction: Inductor fuses it with its neighbours
    STATIC_SHAPES = 2  # the reference loops over its shape: only where that is known


class Cuda(Enum):
    """What runs on CUDA tensors."""

    KERNEL = 0  # the kernel that csrc registers
    REFERENCE = 1  # the reference, registered for CUDA: safe in CUDA graphs, and slow


class MissingKernelError(RuntimeError):
    """An op was called on a device for which no kernel is registered."""


@dataclass(frozen=True)
class Op:
    """What the rest of the project needs to know about one operator."""

    name: str
    schema: str
    reference: Callable
    alloc: Callable | None  # None for an op that mutates its arguments
    inline: Inline
    outputs: tuple[str, ...]
    cuda: Cuda
    workspace: Callable | None = None

    @property
    def packet(self) -> torch._ops.OpOverloadPacket:
        return getattr(getattr(torch.ops, NAMESPACE), self.name)

    @property
    def overload(self) -> torch._ops.OpOverload:
        return self.packet.default

    @property
    def runs_on_cuda(self) -> str:
        """ "kernel" or "reference": what a call on CUDA tensors runs once the library is loaded."""
        return self.cuda.name.lower()

    def has_kernel(self, device_type: str) -> bool:
        key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type, device_type.upper())
        overload = f"{NAMESPACE}::{self.name}" + ("" if self.alloc is None or key == "CPU" else ".out")
        return torch._C._dispatch_has_kernel_for_dispatch_key(overload, key)


TABLE: dict[str, Op] = {}
# Set by dsv4_ops.kernels: the library of CUDA kernels, or why there is none.
cuda_library = ""
why_no_cuda_library = ""


def define(
    schema: str,
    *,
    alloc: Callable,
    reference: Callable,
    check: Callable | None = None,
    inline: Inline = Inline.NEVER,
    cuda: Cuda = Cuda.KERNEL,
    workspace: Callable | None = None,
):
    """Register a functional op and return its packet `torch.ops.dsv4.<name>`.

    schema     `name(Tensor x, float eps) -> (Tensor q, Tensor scale)`; every output is named
    alloc      same arguments, returns uninitialised outputs (a tensor or a tuple): decides dtype, shape and strides
    reference  same arguments, returns the outputs: plain torch, fp32 inside, never a view or an input
    check      same arguments, raises on arguments that no kernel may see; looks at neither the batch nor data
    inline     where a graph pass may open up the op
    cuda       what runs on CUDA tensors
    workspace  same arguments, returns an uninitialised tensor for what a kernel hands from one launch to the next; the
               `.out` overload takes it as its last keyword
    """
    name, args, outputs = _parse(schema)
    checked = alloc if check is None else _sequence(check, alloc)
    LIBRARY.define(schema)
    aliases = [f"Tensor({letter}!)" for letter in "abcdefgh"[: len(outputs)]]
    returns = aliases[0] if len(aliases) == 1 else f"({', '.join(aliases)})"
    out_arguments = ", ".join(f"{alias} {output}" for alias, output in zip(aliases, outputs, strict=True))
    if workspace is not None:
        out_arguments += ", Tensor(z!)? workspace=None"
    # Not tagged torch.Tag.out: Inductor of torch 2.13 then lowers a single-output op with the symbolic sizes of its
    # fake tensor instead of their expressions, and fails on every graph with a dynamic dimension.
    LIBRARY.define(f"{name}.out({args}, *, {out_arguments}) -> {returns}")
    op = TABLE[name] = Op(name, schema, reference, alloc, inline, outputs, cuda, workspace)

    def functional(*arguments):
        allocated = checked(*arguments)
        _require_kernel(op, arguments)
        out = dict(zip(outputs, _as_tuple(allocated), strict=True))
        if workspace is not None:
            out["workspace"] = workspace(*arguments)
        op.packet.out(*arguments, **out)
        return allocated

    check_once = _once_per_signature(check)

    def by_reference(*arguments):
        check_once(*arguments)
        return reference(*arguments)

    def by_reference_out(*arguments, **out):
        for result, output in zip(_as_tuple(by_reference(*arguments)), outputs, strict=True):
            out[output].copy_(result)
        return _from_tuple(tuple(out[output] for output in outputs))

    LIBRARY.impl(name, functional, "CompositeExplicitAutograd")
    for key in ("CPU", "CUDA") if cuda is Cuda.REFERENCE else ("CPU",):
        LIBRARY.impl(name, by_reference, key)
        LIBRARY.impl(f"{name}.out", by_reference_out, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", checked, lib=LIBRARY)
    torch.library.register_fake(
        f"{NAMESPACE}::{name}.out", lambda *a, **out: _from_tuple(tuple(out[o] for o in outputs)), lib=LIBRARY
    )
    return op.packet


def define_mutating(schema: str, *, reference: Callable, check: Callable | None = None):
    """Register an op that updates state in place and returns nothing: `name(Tensor(a!) pool, Tensor x) -> ()`.

    The reference mutates exactly the arguments that the schema declares; it reads the old state itself.
    """
    name, _, outputs = _parse(schema)
    if outputs:
        raise ValueError(f"{name}: an op that mutates state must return (), got {outputs}")
    LIBRARY.define(schema)
    op = TABLE[name] = Op(name, schema, reference, None, Inline.NEVER, (), Cuda.KERNEL)

    check_once = _once_per_signature(check)

    def cpu(*arguments):
        check_once(*arguments)
        reference(*arguments)

    def fake(*arguments):
        if check is not None:
            check(*arguments)

    def other_device(*arguments):
        raise _missing_kernel(op, arguments)

    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, other_device, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return op.packet


def expect(condition: bool, op: str, message: str) -> None:
    """Raise a ValueError that names the op when an argument is not what its schema comment says."""
    if not condition:
        raise ValueError(f"dsv4::{op}: {message}")


def describe(tensor: Tensor | None) -> str:
    """`[4, 4096] bfloat16`: how error messages name a tensor."""
    if tensor is None:
        return "None"
    return f"[{', '.join(str(size) for size in tensor.shape)}] {str(tensor.dtype).removeprefix('torch.')}"


def _require_kernel(op: Op, arguments: tuple) -> None:
    devices = {leaf.device.type for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)}
    if any(not op.has_kernel(device) for device in devices - {"meta"}):
        raise _missing_kernel(op, arguments)


def _missing_kernel(op: Op, arguments: tuple) -> MissingKernelError:
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    devices = sorted({str(tensor.device) for tensor in tensors})
    shapes = ", ".join(describe(tensor) for tensor in tensors)
    reason = why_no_cuda_library or "Build the CUDA kernels with `dsv4 build`, or move the tensors to the CPU."
    return MissingKernelError(
        f"dsv4::{op.name} has no kernel for device {', '.join(devices)} (arguments: {shapes}). {reason}"
    )


def _parse(schema: str) -> tuple[str, str, tuple[str, ...]]:
    head, returns = schema.rsplit(" -> ", 1)
    name, args = head.split("(", 1)
    names = tuple(output.split()[-1] for output in returns.strip("() ").split(",") if output.strip())
    if any(output == "Tensor" for output in names):
        raise ValueError(f"{name}: every output needs a name, got '-> {returns}'")
    return name, args.removesuffix(")"), names


def _sequence(check: Callable, alloc: Callable) -> Callable:
    if len(inspect.signature(check).parameters) != len(inspect.signature(alloc).parameters):
        raise ValueError(f"check and alloc must take the same arguments: {check}, {alloc}")

    def checked(*arguments):
        check(*arguments)
        return alloc(*arguments)

    return checked


def _once_per_signature(check: Callable | None) -> Callable:
    """The check, skipped where these shapes, dtypes and scalars passed it before: a decode step repeats them all."""
    passed = set()

    def check_once(*arguments):
        signature = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in arguments)
        if check is None or signature in passed:
            return
        check(*arguments)
        if len(passed) == REMEMBERED_SIGNATURES:
            passed.clear()
        passed.add(signature)

    return check_once


def _as_tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _from_tuple(values: tuple):
    return values[0] if len(values) == 1 else values
