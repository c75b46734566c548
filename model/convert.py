"""Write a checkpoint in another weight format, one output file in memory at a time."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from model.checkpoint import INDEX_NAME, Checkpoint, validate
from model.checkpoint_keys import ITEM_SIZE, Expected, expected_keys, linears, plain_tensors
from model.config import ModelConfig, read_config_json
from model.convert_weights import WeightConverter
from model.errors import UserError
from model.new_directory import new_directory
from model.weight_formats import DENSE, FP8, FP8_BLOCK, MXFP4, NVFP4, NVFP4_GROUP, WeightFormats, has_mtp

FORMATS = {
    "bf16": WeightFormats(DENSE, DENSE, DENSE, DENSE),
    "fp32": WeightFormats(DENSE, DENSE, DENSE, DENSE),
    "official": WeightFormats(FP8, MXFP4, FP8, MXFP4),
    "nvfp4-experts": WeightFormats(FP8, NVFP4, FP8, MXFP4),  # as modelopt makes it: MTP experts stay MXFP4
    "nvfp4": WeightFormats(NVFP4, NVFP4, NVFP4, NVFP4),
}
SHARD_BYTES = 2 * 10**9
COPIED_FILE_BYTES = 64 * 2**20  # tokenizer.json is the largest file that goes along
NOT_COPIED = ("config.json", "hf_quant_config.json", INDEX_NAME)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def convert(
    source_dir: str | Path,
    target_dir: str | Path,
    format: str,
    requantize: bool = False,
    progress: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write the model of `source_dir` to `target_dir`, which must not exist or be empty, with its linears in `format`.

    format      one of FORMATS. What is not a linear is BF16 or F32 as released; all F32 in "fp32".
    requantize  allow rounding where MXFP4 cannot become NVFP4 exactly
    Returns the names of the weights for which that happened. `target_dir` appears when it is complete.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}, expected one of {', '.join(FORMATS)}")
    settings = read_config_json(source_dir)
    config = ModelConfig.from_dict(settings)
    checkpoint = Checkpoint(source_dir)
    source = validate(checkpoint, config)
    if not has_mtp(checkpoint):
        config = config.without_mtp()
    keeps_input_scales = format == "nvfp4-experts" and source.input_scales and source.experts == NVFP4
    target = replace(FORMATS[format], input_scales=keeps_input_scales)
    expected = expected_keys(config, target)
    total = sum(prod(tensor.shape) * ITEM_SIZE[_stored_type(tensor, format)] for tensor in expected.values())
    converter = WeightConverter(checkpoint.tensor, source, target, requantize)
    with new_directory(target_dir) as work:
        _require_space(work, total)
        writer = _ShardWriter(work, shard_bytes)
        with tqdm(total=total, unit="B", unit_scale=True, desc=format, file=sys.stderr, disable=not progress) as bar:
            for key, tensor in _tensors(checkpoint, config, converter):
                dtype = _stored_type(expected[key], format) if key in expected else checkpoint.dtype(key)
                stored = _as_stored(tensor, dtype)
                writer.add(key, stored)
                bar.update(stored.nbytes)
        writer.finish()
        _copy_small_files(Path(source_dir), work)
        (work / "config.json").write_text(json.dumps(_target_settings(settings, config, format), indent=2) + "\n")
    return converter.requantized


def _tensors(checkpoint: Checkpoint, config: ModelConfig, converter: WeightConverter) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the new checkpoint; a DSpark drafter goes along as it is."""
    for key, _, _ in plain_tensors(config):
        yield key, checkpoint.tensor(key)
    for names in _groups(config):
        yield from converter.convert(names).items()
    if config.has_dspark_drafter:
        yield from ((key, checkpoint.tensor(key)) for key in checkpoint.keys() if key.startswith("mtp."))


def _groups(config: ModelConfig) -> Iterator[tuple[str, ...]]:
    """Linears one by one, but w1 and w3 of an expert together: they share a weight_scale_2."""
    for name, _, _ in linears(config):
        stem, _, leaf = name.rpartition(".")
        if leaf != "w3":
            yield (name, f"{stem}.w3") if leaf == "w1" else (name,)


def _stored_type(tensor: Expected, format: str) -> str:
    return "F32" if format == "fp32" and tensor.dtypes[0] == "BF16" else tensor.dtypes[0]


def _as_stored(tensor: Tensor, dtype: str) -> Tensor:
    """Bytes get their name back (checkpoint tensors come as uint8), floats their precision; integer tables stay."""
    if dtype not in TORCH_DTYPES:
        return tensor.contiguous()
    if tensor.element_size() == 1:
        return tensor.contiguous().view(TORCH_DTYPES[dtype])
    return tensor.to(TORCH_DTYPES[dtype]).contiguous()


class _ShardWriter:
    """Collects tensors and writes a file whenever `limit` bytes are together."""

    def __init__(self, directory: Path, limit: int):
        self.directory, self.limit = directory, limit
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = self.total_bytes = 0
        self.shards: list[list[str]] = []

    def add(self, key: str, tensor: Tensor) -> None:
        if self.pending and self.pending_bytes + tensor.nbytes > self.limit:
            self._flush()
        self.pending[key] = tensor
        self.pending_bytes += tensor.nbytes

    def finish(self) -> None:
        """Give the files their final names and write the index; a single file needs none."""
        self._flush()
        if len(self.shards) == 1:
            self._part(0).rename(self.directory / "model.safetensors")
            return
        weight_map = {}
        for number, keys in enumerate(self.shards):
            name = f"model-{number + 1:05}-of-{len(self.shards):05}.safetensors"
            self._part(number).rename(self.directory / name)
            weight_map |= dict.fromkeys(keys, name)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self.directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    def _part(self, number: int) -> Path:
        return self.directory / f"part-{number}.safetensors"

    def _flush(self) -> None:
        try:
            save_file(self.pending, self._part(len(self.shards)), metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"cannot write {self._part(len(self.shards))}: {error}") from error
        self.shards.append(list(self.pending))
        self.total_bytes += self.pending_bytes
        self.pending, self.pending_bytes = {}, 0


def _require_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"{directory.parent} has {free / 1e9:.1f} GB free, the converted checkpoint needs {needed / 1e9:.1f} GB"
        )


def _copy_small_files(source: Path, target: Path) -> None:
    """Tokenizer, generation settings, licence and the like."""
    for path in sorted(source.iterdir()):
        is_weight = path.name in NOT_COPIED or path.suffix in WEIGHT_SUFFIXES
        if path.is_file() and not is_weight and path.stat().st_size <= COPIED_FILE_BYTES:
            shutil.copyfile(path, target / path.name)


def _target_settings(settings: dict[str, Any], config: ModelConfig, format: str) -> dict[str, Any]:
    """config.json of the new checkpoint: the old one with another quantisation."""
    settings = {key: value for key, value in settings.items() if key not in ("quantization_config", "expert_dtype")}
    for name in {"torch_dtype", "dtype"} & settings.keys():
        settings[name] = "float32" if format == "fp32" else "bfloat16"
    if format in ("bf16", "fp32"):
        return settings
    if format == "nvfp4":
        not_quantized = ["embed", "head", "*.ffn.gate", "*.compressor.*", "*.indexer.weights_proj"]
        quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": NVFP4_GROUP}
        return {**settings, "quantization_config": {**quantization, "exclude_modules": not_quantized}}
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "activation_scheme": "dynamic",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }
    if format == "nvfp4-experts":
        nvfp4 = {"quant_algo": "NVFP4", "group_size": NVFP4_GROUP}
        quantization |= {
            "quant_algo": "MIXED_PRECISION",
            "moe_quant_algo": "NVFP4",
            "group_size": NVFP4_GROUP,
            "quantized_layers": {f"layers.{layer}.ffn.experts": nvfp4 for layer in range(config.num_hidden_layers)},
            "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
        }
    return {**settings, "expert_dtype": "fp4", "quantization_config": quantization}
