"""One random model in every storage format, and the values of its weights read by plain formulas."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graph_tests.random_checkpoint import small_ratio_config, write_random_checkpoint
from model.checkpoint_keys import linears
from model.config import ModelConfig
from model.convert import convert

# Inputs of quantised layers are multiples of 128 and more than one block; 64 channels without rope; a draft block.
CONFIG = small_ratio_config(
    hidden_size=256, moe_intermediate_size=128, num_attention_heads=4, head_dim=128, qk_rope_head_dim=64,
    q_lora_rank=128, o_groups=2, o_lora_rank=64, index_n_heads=64, index_head_dim=64, n_routed_experts=6,
    num_nextn_predict_layers=1, num_hash_layers=1, swiglu_limit=2.0,
)  # fmt: skip
LINEARS = [name for name, _, _ in linears(ModelConfig.from_dict(CONFIG))]
FORMATS = ("bf16", "official", "fp8 with fp32 scales", "nvfp4-experts", "nvfp4")
QUANTISED = FORMATS[1:]
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def write_formats(root: Path) -> dict[str, Path]:
    """The directory of each of FORMATS; all are made from the first."""
    directories = {name: root / name.replace(" ", "-") for name in FORMATS}
    tensors = write_random_checkpoint(directories["bf16"], CONFIG, seed=12)
    for name in ("official", "nvfp4-experts", "nvfp4"):
        convert(directories["bf16"], directories[name], name, progress=False)
    write(directories["fp8 with fp32 scales"], _fp8_with_fp32_scales(tensors))
    return directories


def write(directory: Path, tensors: dict[str, Tensor]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def stored(directory: Path) -> dict[str, Tensor]:
    """All tensors as they are in the files."""
    return {key: value for path in directory.glob("*.safetensors") for key, value in load_file(path).items()}


def dequantised(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same model with dense linears: values in fp32, then rounded to `dtype`. fp32 has no bf16 tensor at all."""
    twin = {}
    for key, value in tensors.items():
        name, _, part = key.rpartition(".")
        if name not in LINEARS:
            twin[key] = value.float() if value.dtype == torch.bfloat16 and dtype == torch.float32 else value
        elif part == "weight":
            twin[key] = weight_values(tensors, name).to(dtype)
    return twin


def weight_values(tensors: dict[str, Tensor], name: str) -> Tensor:
    """fp32 [N, K] of linear `name`."""
    weight = tensors[f"{name}.weight"]
    if weight.dtype == torch.float8_e4m3fn:
        scale = tensors[f"{name}.scale"].float()
        spread = scale.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)[:, : weight.shape[1]]
        return weight.float() * spread
    if weight.element_size() > 1:
        return weight.float()
    code = weight.view(torch.uint8).long()
    code = torch.stack((code & 15, code >> 4), -1).flatten(1)  # the even column is the low nibble
    value = E2M1[code & 7] * torch.where(code > 7, -1.0, 1.0)
    if f"{name}.scale" in tensors:
        return value * tensors[f"{name}.scale"].float().repeat_interleave(32, 1)
    block = tensors[f"{name}.weight_scale"].float().repeat_interleave(16, 1)
    return value * block * tensors[f"{name}.weight_scale_2"]


def _fp8_with_fp32_scales(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As V4-Flash-Base is stored: experts in FP8 too, scales amax / 448 of 128x128 in fp32."""
    tensors = dict(tensors)
    for name in LINEARS:
        weight = tensors[f"{name}.weight"].float()
        blocks = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 128, 0, -len(weight) % 128))
        scale = blocks.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).abs().amax((1, 3)) / 448
        spread = scale.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)[:, : weight.shape[1]]
        tensors[f"{name}.weight"] = (weight / spread).to(torch.float8_e4m3fn)
        tensors[f"{name}.scale"] = scale
    return tensors
