"""Chooses the class of each linear from the checkpoint's formats and how the model is to compute."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.dequantize import dequantize_weight
from model.linear import (
    Binding,
    DenseGroupedLinear,
    DenseLinear,
    Fp8Linear,
    Nvfp4GroupedLinear,
    Nvfp4Linear,
    Parts,
    PlainLinear,
    SharedInput,
    W8a16GroupedLinear,
)
from model.weight_formats import DENSE, F32, FP8, NVFP4, WeightFormats

LINEARS = {DENSE: DenseLinear, FP8: Fp8Linear, NVFP4: Nvfp4Linear}
GROUPED_LINEARS = {DENSE: DenseGroupedLinear, FP8: W8a16GroupedLinear, NVFP4: Nvfp4GroupedLinear}


@dataclass(frozen=True)
class Storage:
    """formats: how the checkpoint stores its linears. dtype: of activations and of everything that is not quantised.

    With `quantise_activations` off, quantised weights are dequantised while loading: the same values, multiplied with
    activations as they are.
    """

    formats: WeightFormats
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    quantise_activations: bool = True

    @property
    def fp8_scale_dtype(self) -> torch.dtype:
        return torch.float32 if self.formats.fp8_scale == F32 else torch.uint8

    def format_of(self, name: str) -> str:
        return self.formats.of(name) if self.quantise_activations else DENSE

    def linear(self, name: str, rows: int, columns: int) -> nn.Module:
        return LINEARS[self.format_of(name)]({name: rows}, columns, self)

    def linears(self, parts: Parts, columns: int) -> SharedInput:
        """Linears of one format that multiply the same input: one product where the format can join their rows."""
        kind = LINEARS[self.format_of(next(iter(parts)))]
        groups = [parts] if kind.can_join(parts) else [{name: rows} for name, rows in parts.items()]
        return SharedInput([kind(group, columns, self) for group in groups])

    @property
    def fp32_operand_dtype(self) -> torch.dtype:
        """Of weights multiplied in fp32. A CPU would convert them in every call, a GPU does so while reading."""
        return torch.float32 if self.device.type == "cpu" else self.dtype

    def plain_linear(self, parts: Parts, columns: int) -> PlainLinear:
        """Linears that no checkpoint quantises, whose product is computed and kept in fp32."""
        return PlainLinear(parts, columns, self)

    def grouped_linear(self, name: str, groups: int, rank: int, columns: int) -> nn.Module:
        """Output projection by groups of heads. The official code multiplies it in BF16 even where it is stored FP8.

        FP8 weights whose scales are powers of two are exact in BF16: a GPU converts them while reading, a CPU would do
        so in every call. With other scales the conversion rounds, and happens once, while loading.
        """
        kind = self.format_of(name)
        if kind == FP8 and (self.device.type == "cpu" or self.formats.fp8_scale == F32):
            kind = DENSE
        return GROUPED_LINEARS[kind]({name: groups * rank}, columns, self)

    def dense_binding(self, name: str, target: Tensor) -> Binding:
        """Fill `target` with the linear's weight, dequantised if the checkpoint quantises it."""
        kind = self.formats.of(name)
        if kind == DENSE:
            return Binding((f"{name}.weight",), target)
        return Binding(self.formats.keys(name), target, lambda *parts: dequantize_weight(kind, *parts))
