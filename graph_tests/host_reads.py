"""A dispatch mode that refuses every host read and every tensor that crosses devices."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that wait for the device: they return a Python value, or a shape that depends on data.
READS = {
    "aten._local_scalar_dense",
    "aten.item",
    "aten.is_nonzero",
    "aten.equal",
    "aten.nonzero",
    "aten.nonzero_numpy",
    "aten.masked_select",
    "aten._unique2",
    "aten.unique_dim",
    "aten.unique_consecutive",
    "aten.bincount",
    "aten.repeat_interleave",
    "aten.multinomial",
    "aten._pin_memory",
}


class HostReadError(AssertionError):
    """Code under `RefuseHostReads` asked for device data."""


class RefuseHostReads(TorchDispatchMode):
    """Raises HostReadError; `calls` lists the operators that ran."""

    def __init__(self):
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.replace("::", ".")
        self.calls.append(name)
        indexed_by_mask = name == "aten.index" and any(
            isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1])
        )
        # repeat_interleave with an int is arithmetic; only the form with a tensor of counts reads them.
        if indexed_by_mask or (name in READS and func._overloadname not in ("self_int",)):
            raise HostReadError(f"{name} reads device data on the host")
        outputs = func(*args, **(kwargs or {}))
        devices = {
            leaf.device.type
            for leaf in tree_leaves((args, kwargs, outputs))
            if isinstance(leaf, Tensor) and leaf.dim() > 0
        }
        if len(devices) > 1:
            raise HostReadError(f"{name} moves data between {sorted(devices)}")
        return outputs
