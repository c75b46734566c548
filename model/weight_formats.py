"""In which format a checkpoint stores each of its linear layers.

dense   `weight` BF16 or F32 [N, K]
fp8     `weight` F8_E4M3 [N, K], `scale` F8_E8M0 (Flash-Base: F32) [ceil(N/128), ceil(K/128)]
mxfp4   `weight` I8 [N, K/2], two E2M1 codes a byte, even k in the low nibble, `scale` F8_E8M0 [N, K/32]
nvfp4   `weight` U8 [N, K/2] as mxfp4, `weight_scale` F8_E4M3 [N, K/16], `weight_scale_2` F32 []

NVFP4 made by modelopt has an `input_scale` F32 [] more per weight, which nothing here needs.
Only linears have a format. Embedding, head, router, norms, compressor projections and indexer.weights_proj are never
quantised.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.config import ModelConfig
from model.errors import CheckpointError

if TYPE_CHECKING:
    from model.checkpoint import Checkpoint

DENSE, FP8, MXFP4, NVFP4 = "dense", "fp8", "mxfp4", "nvfp4"
# The tensors that make up one weight, in the order in which `dequantize_weight` takes them.
PARTS = {
    DENSE: ("weight",),
    FP8: ("weight", "scale"),
    MXFP4: ("weight", "scale"),
    NVFP4: ("weight", "weight_scale", "weight_scale_2"),
}
E8M0, F32 = "F8_E8M0", "F32"  # safetensors' names
FP8_BLOCK = 128
MXFP4_GROUP = 32
NVFP4_GROUP = 16
_EXPERT = re.compile(r"\.ffn\.experts\.\d+\.w[123]$")
# quantization_config entries whose other values mean tensors that cannot be read here
_KNOWN = {
    "quant_method": ("fp8", "modelopt"),
    "fmt": ("e4m3",),
    "weight_block_size": ([FP8_BLOCK, FP8_BLOCK],),
    "scale_fmt": ("ue8m0", "float32"),
    "quant_algo": ("MIXED_PRECISION", "NVFP4", "FP8"),
    "moe_quant_algo": ("NVFP4",),
    "group_size": (NVFP4_GROUP,),
}


@dataclass(frozen=True)
class WeightFormats:
    """The formats of one checkpoint; the layers of one group all have the same.

    linear is everything in the trunk but the routed experts: attention (wq_a wq_b wkv wo_a wo_b), indexer.wq_b, shared
    experts. mtp and mtp_experts are the same two groups of the MTP blocks (mtp with e_proj and h_proj).
    """

    linear: str = DENSE
    experts: str = DENSE
    mtp: str = DENSE
    mtp_experts: str = DENSE
    fp8_scale: str = E8M0  # or F32
    input_scales: bool = False  # the nvfp4 weights come with an input_scale each

    def of(self, name: str) -> str:
        """Format of the linear `name`, e.g. "layers.3.attn.wq_a" or "mtp.0.ffn.experts.7.w2"."""
        if name.startswith("mtp."):
            return self.mtp_experts if _EXPERT.search(name) else self.mtp
        return self.experts if _EXPERT.search(name) else self.linear

    def keys(self, name: str) -> tuple[str, ...]:
        """The tensors of the linear `name`, in the order in which `dequantize_weight` takes them."""
        return tuple(f"{name}.{part}" for part in PARTS[self.of(name)])


def detect_formats(checkpoint: "Checkpoint", config: ModelConfig) -> WeightFormats:
    """The formats, read off the first linear of each group; `validate` then compares every tensor with them."""
    check_quantization(config.quantization)
    groups = {"linear": "layers.0.attn.wq_a", "experts": "layers.0.ffn.experts.0.w1"}
    if config.num_nextn_predict_layers and has_mtp(checkpoint):
        groups |= {"mtp": "mtp.0.attn.wq_a", "mtp_experts": "mtp.0.ffn.experts.0.w1"}
    formats = {group: _format_of(checkpoint, name) for group, name in groups.items()}
    for group in formats.keys() & {"linear", "mtp"}:
        if formats[group] == MXFP4:
            raise CheckpointError(f"{groups[group]} is stored as MXFP4; only routed experts may be")
    fp8 = [name for group, name in groups.items() if formats[group] == FP8]
    nvfp4 = [name for group, name in groups.items() if formats[group] == NVFP4]
    scale = f"{fp8[0]}.scale" if fp8 else None
    return WeightFormats(
        **formats,
        fp8_scale=F32 if scale in checkpoint and checkpoint.dtype(scale) == F32 else E8M0,
        input_scales=any(f"{name}.input_scale" in checkpoint for name in nvfp4),
    )


def has_mtp(checkpoint: "Checkpoint") -> bool:
    """A checkpoint without a single mtp.* tensor is one from which the MTP blocks were removed."""
    return any(key.startswith("mtp.") for key in checkpoint.keys())


def check_quantization(quantization: Mapping[str, Any]) -> None:
    """Refuse a quantization_config that declares formats other than those above; the tensors decide among these."""
    for name, known in _KNOWN.items():
        value = quantization.get(name)
        if value is not None and value not in known:
            supported = ", ".join(str(choice) for choice in known)
            raise CheckpointError(
                f"config.json: quantization_config.{name} {value!r} is not supported, only {supported}"
            )


def _format_of(checkpoint: "Checkpoint", name: str) -> str:
    key = f"{name}.weight"
    if key not in checkpoint:
        raise CheckpointError(f"{checkpoint.directory}: {key} is missing{_hint(checkpoint)}")
    dtype = checkpoint.dtype(key)
    if dtype in ("BF16", "F32"):
        return DENSE
    if dtype == "F8_E4M3":
        return FP8
    if dtype in ("I8", "U8"):
        return NVFP4 if f"{name}.weight_scale" in checkpoint else MXFP4
    raise CheckpointError(f"{checkpoint.directory}: {key} is {dtype}; weights must be BF16, F32, F8_E4M3, I8 or U8")


def _hint(checkpoint: "Checkpoint") -> str:
    if any(key.startswith("model.") for key in checkpoint.keys()):
        return " (keys start with 'model.', as save_pretrained of transformers writes them; use the released key names)"
    return ""
