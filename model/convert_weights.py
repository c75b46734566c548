"""One weight from one storage format into another."""

from collections.abc import Callable

from torch import Tensor

from model.dequantize import dequantize_weight
from model.errors import CheckpointError
from model.quantize import (
    cast_mxfp4_to_nvfp4,
    nvfp4_weight_scale_2,
    quantize_weight_fp8,
    quantize_weight_mxfp4,
    quantize_weight_nvfp4,
)
from model.weight_formats import DENSE, FP8, MXFP4, NVFP4, WeightFormats


class WeightConverter:
    """Converts the linears of a checkpoint; `read` gives its tensors by key, as `Checkpoint.tensor` does.

    Tensors that have the wanted format already are passed on as they are. MXFP4 becomes NVFP4 without any rounding, or
    not at all unless `requantize`; every other change dequantises and rounds to the new format.
    """

    def __init__(
        self, read: Callable[[str], Tensor], source: WeightFormats, target: WeightFormats, requantize: bool = False
    ):
        self.read, self.source, self.target, self.requantize = read, source, target, requantize
        self.requantized: list[str] = []  # MXFP4 weights that NVFP4 could not hold exactly

    def convert(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """The tensors of linears that share a weight_scale_2 in NVFP4: w1 and w3 of an expert, or one linear."""
        old, new = self.source.of(names[0]), self.target.of(names[0])
        if old == new and (new != FP8 or self.source.fp8_scale == self.target.fp8_scale):
            return self._unchanged(names)
        if (old, new) == (MXFP4, NVFP4):
            tensors = self._cast(names)
            if tensors is not None:
                return tensors
        return self._quantize(names, new)

    def _unchanged(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        keys = [key for name in names for key in self.target.keys(name)]
        if self.target.of(names[0]) == NVFP4 and self.target.input_scales:
            keys += [f"{name}.input_scale" for name in names]
        return {key: self.read(key) for key in keys}

    def _cast(self, names: tuple[str, ...]) -> dict[str, Tensor] | None:
        parts = [tuple(self.read(key) for key in self.source.keys(name)) for name in names]
        cast = cast_mxfp4_to_nvfp4(parts)
        if cast is None:
            if not self.requantize:
                raise CheckpointError(
                    f"{' and '.join(names)}: the MXFP4 scales span more powers of two than NVFP4 block scales hold; "
                    "pass --requantize to round these weights"
                )
            self.requantized += names
            return None
        scales, shared = cast
        tensors = {}
        for name, (weight, _), scale in zip(names, parts, scales, strict=True):
            tensors |= dict(zip(self.target.keys(name), (weight, scale, shared.clone()), strict=True))
        return tensors

    def _quantize(self, names: tuple[str, ...], new: str) -> dict[str, Tensor]:
        values = [self._dequantize(name) for name in names]
        if new == DENSE:
            stored = [(value,) for value in values]
        elif new == FP8:
            stored = [quantize_weight_fp8(value) for value in values]
        elif new == MXFP4:
            stored = [quantize_weight_mxfp4(value) for value in values]
        else:
            shared = nvfp4_weight_scale_2(*values)
            stored = [(*quantize_weight_nvfp4(value, shared), shared.clone()) for value in values]
        tensors = {}
        for name, parts in zip(names, stored, strict=True):
            tensors |= dict(zip(self.target.keys(name), parts, strict=True))
        return tensors

    def _dequantize(self, name: str) -> Tensor:
        value = dequantize_weight(self.source.of(name), *(self.read(key) for key in self.source.keys(name)))
        if not value.abs().amax().isfinite():
            raise CheckpointError(f"{name} holds infinite or undefined weights")
        return value
