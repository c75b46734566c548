"""Linear layers in the storage formats of the checkpoints, and how their inputs are quantised.

A quantised layer multiplies quantised activations, but for W8A16. Several layers often share one input, so quantisation
is a step of its own: `activation = quantise(x, layer.activation)` once, then `layer(*activation)` for each. Where they
can, layers with one input are one product: their weights lie below one another in one parameter, in whose rows the
loader writes the checkpoint's tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dsv4_ops import ops
from model.errors import CheckpointError

if TYPE_CHECKING:
    from model.storage import Storage

FP8_BLOCK = 128
ACTIVATION_GROUP = {"dense": 1, "fp8": FP8_BLOCK, "nvfp4": 16}  # columns of an activation that share a scale
Parts = Mapping[str, int]  # linears of the checkpoint, by name, and how many rows of a weight each has, from the top


@dataclass(frozen=True)
class Binding:
    """Where checkpoint tensors go: `target` is filled with `convert` of the tensors under `keys` (or a plain copy)."""

    keys: tuple[str, ...]
    target: Tensor
    convert: Callable[..., Tensor] | None = None


def quantise(x: Tensor, activation: str) -> tuple[Tensor, ...]:
    """What a layer multiplies of x [..., K]: "dense" x itself, "fp8" 1x128 UE8M0, "nvfp4" 1x16 and a row scale."""
    if activation == "dense":
        return (x,)
    if activation == "fp8":
        return tuple(ops.quant_fp8(x, FP8_BLOCK))
    row_scale = ops.nvfp4_row_scale(x)
    return (*ops.quant_nvfp4(x, row_scale), row_scale)


def parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Uninitialised storage for a weight; the loader fills it and fails if a key is missing."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


def require_groups(name: str, size: int, activation: str) -> None:
    group = ACTIVATION_GROUP[activation]
    if size % group:
        raise CheckpointError(f"{name}: quantised layers need an input size that is a multiple of {group}, got {size}")


def slices(tensor: Tensor, rows: Sequence[int], block: int = 1) -> Iterator[Tensor]:
    """The rows of each part in a tensor that has a row for each `block` rows of the parts."""
    first = 0
    for count in rows:
        last = first + -(-count // block)
        yield tensor[first:last]
        first = last


class DenseLinear(nn.Module):
    """y = x W^T in the dtype of x. Weights of a quantised checkpoint are dequantised while loading."""

    activation = "dense"

    def __init__(self, parts: Parts, columns: int, storage: Storage):
        super().__init__()
        self.names, self.rows, self.storage = *zip(*parts.items(), strict=True), storage
        self.weight = parameter(sum(parts.values()), columns, dtype=storage.dtype, device=storage.device)

    @staticmethod
    def can_join(parts: Parts) -> bool:
        return True

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_dense(x, self.weight)

    def bindings(self) -> list[Binding]:
        weights = slices(self.weight, self.rows)
        return [self.storage.dense_binding(name, weight) for name, weight in zip(self.names, weights, strict=True)]


class PlainLinear(nn.Module):
    """The weight of linears that no checkpoint quantises.

    Rows of the product start at multiples of 16 bytes, as who reads them wants: behind the last part there are rows of
    zeros where that needs some.
    """

    def __init__(self, parts: Parts, columns: int, storage: Storage):
        super().__init__()
        self.names, self.rows = zip(*parts.items(), strict=True)
        used = sum(self.rows)
        self.padding = (-used % 4,) if used % 4 else ()
        rows = used + sum(self.padding)
        self.weight = parameter(rows, columns, dtype=storage.fp32_operand_dtype, device=storage.device)
        self.weight[used:].zero_()

    def fp32_products(self, x: Tensor) -> tuple[Tensor, ...]:
        """The result of each of the linears, views of one fp32 product."""
        return ops.linear_fp32(x, self.weight).split(self.rows + self.padding, -1)[: len(self.rows)]

    def bindings(self) -> list[Binding]:
        weights = slices(self.weight, self.rows)
        return [Binding((f"{name}.weight",), weight) for name, weight in zip(self.names, weights, strict=True)]


class Fp8Linear(nn.Module):
    """E4M3 weights with a UE8M0 scale for each 128x128 block; activations E4M3, 1x128."""

    activation = "fp8"

    def __init__(self, parts: Parts, columns: int, storage: Storage):
        super().__init__()
        self.names, self.rows = zip(*parts.items(), strict=True)
        require_groups(self.names[0], columns, self.activation)
        rows = sum(self.rows)
        self.weight = parameter(rows, columns, dtype=torch.float8_e4m3fn, device=storage.device)
        blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
        self.weight_scale = parameter(*blocks, dtype=storage.fp8_scale_dtype, device=storage.device)

    @staticmethod
    def can_join(parts: Parts) -> bool:
        """Every part but the last ends where a block of scales ends."""
        return all(rows % FP8_BLOCK == 0 for rows in list(parts.values())[:-1])

    def forward(self, x: Tensor, x_scale: Tensor) -> Tensor:
        return ops.linear_fp8(x, x_scale, self.weight, self.weight_scale)

    def bindings(self) -> list[Binding]:
        weights, scales = slices(self.weight, self.rows), slices(self.weight_scale, self.rows, FP8_BLOCK)
        result = []
        for name, weight, scale in zip(self.names, weights, scales, strict=True):
            result += [fp8_binding(f"{name}.weight", weight), Binding((f"{name}.scale",), scale, as_bytes)]
        return result


class Nvfp4Linear(nn.Module):
    """E2M1 weights, an E4M3 scale for each 16 along K and one fp32 scale; activations the same with a scale per row."""

    activation = "nvfp4"

    def __init__(self, parts: Parts, columns: int, storage: Storage):
        super().__init__()
        ((self.name, rows),) = parts.items()
        require_groups(self.name, columns, self.activation)
        self.rows, device = (rows,), storage.device
        self.weight = parameter(rows, columns // 2, dtype=torch.uint8, device=device)
        self.weight_scale = parameter(rows, columns // 16, dtype=torch.float8_e4m3fn, device=device)
        self.weight_global = parameter(1, dtype=torch.float32, device=device)

    @staticmethod
    def can_join(parts: Parts) -> bool:
        """Each has an fp32 scale of its own."""
        return len(parts) == 1

    def forward(self, x: Tensor, x_scale: Tensor, x_global: Tensor) -> Tensor:
        return ops.linear_nvfp4(x, x_scale, x_global, self.weight, self.weight_scale, self.weight_global)

    def bindings(self) -> list[Binding]:
        return [
            Binding((f"{self.name}.weight",), self.weight, as_bytes),
            Binding((f"{self.name}.weight_scale",), self.weight_scale),
            Binding((f"{self.name}.weight_scale_2",), self.weight_global, lambda scale: scale.reshape(1)),
        ]


class SharedInput(nn.Module):
    """Linears with one input, as few products as their format allows: what each returns, side by side."""

    def __init__(self, products: Sequence[nn.Module]):
        super().__init__()
        self.products = nn.ModuleList(products)
        self.activation = products[0].activation

    def forward(self, *activation: Tensor) -> Tensor:
        results = [product(*activation) for product in self.products]
        return results[0] if len(results) == 1 else torch.cat(results, -1)

    def split(self, *activation: Tensor) -> list[Tensor]:
        """The result of each of the linears; of one product they are views."""
        results = []
        for product in self.products:
            y = product(*activation)
            results += [y] if len(product.rows) == 1 else y.split(product.rows, -1)
        return results

    def bindings(self) -> list[Binding]:
        return [binding for product in self.products for binding in product.bindings()]


class DenseGroupedLinear(DenseLinear):
    """x [..., G, K] times a block-diagonal weight: rows g * R .. (g + 1) * R - 1 multiply group g. -> [..., G * R]."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.grouped_linear_dense(x, self.weight)


class W8a16GroupedLinear(Fp8Linear):
    """The same with FP8 weights and activations as they are: the bits that dequantised weights give, half the bytes."""

    activation = "dense"

    def forward(self, x: Tensor) -> Tensor:
        return ops.grouped_linear_w8a16(x, self.weight, self.weight_scale)


class Nvfp4GroupedLinear(Nvfp4Linear):
    """The same with NVFP4 weights and activations."""

    def forward(self, x: Tensor, x_scale: Tensor, x_global: Tensor) -> Tensor:
        return ops.grouped_linear_nvfp4(x, x_scale, x_global, self.weight, self.weight_scale, self.weight_global)


def as_bytes(tensor: Tensor) -> Tensor:
    """UE8M0 scales and packed E2M1 pairs travel as uint8; fp32 scales stay."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def fp8_binding(key: str, target: Tensor) -> Binding:
    """E4M3 weights, refused if a code is NaN: kernels read the bits without looking for it."""

    def finite(weight: Tensor) -> Tensor:
        if weight.device.type != "meta" and ((weight.view(torch.uint8) & 0x7F) == 0x7F).any():
            raise CheckpointError(f"{key} holds NaN; the file is damaged or was quantised from a diverged model")
        return weight

    return Binding((key,), target, finite)
