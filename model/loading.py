"""Load a checkpoint directory into a model, and refit a live model with new weights at the same addresses."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from model.checkpoint import Checkpoint, validate
from model.config import ModelConfig
from model.errors import CheckpointError, UserError
from model.state import CacheFormat, StateSizes
from model.storage import Storage
from model.transformer import DeepseekV4
from model.weight_formats import has_mtp

DEFAULT_CHUNK = 256
# Activations are scaled by their own row, not by the calibrated scale that some NVFP4 checkpoints carry.
UNBOUND_SUFFIX = ".input_scale"


def load(
    checkpoint_dir: str | Path,
    *,
    device: str | torch.device = "cpu",
    max_batch: int = 1,
    max_seq_len: int = 4096,
    max_chunk: int = DEFAULT_CHUNK,
    exact: bool = False,
    quantise_activations: bool = True,
    index_fp8: bool = False,
    progress: bool = False,
) -> DeepseekV4:
    """Build the model of a checkpoint directory (config.json and safetensors with the released keys) on `device`.

    max_batch, max_seq_len, max_chunk    capacities of the state: sequences, positions each, rows of one prefill call
    exact                   compute in fp32 and quantise neither activations nor caches nor index keys
    quantise_activations    off: quantised weights are dequantised while loading and multiply plain activations
    index_fp8               store index keys as FP8 instead of FP4
    Raises CheckpointError if a tensor is missing, unused, mis-shaped or unreadable, UserError for a device that is not there.
    """
    device = usable_device(device)
    config = ModelConfig.from_directory(checkpoint_dir)
    checkpoint = Checkpoint(checkpoint_dir)
    formats = validate(checkpoint, config)
    if not has_mtp(checkpoint):
        config = config.without_mtp()
    check_sizes(config, max_batch, max_seq_len, max_chunk)
    storage = Storage(
        formats=formats,
        device=device,
        dtype=torch.float32 if exact else torch.bfloat16,
        quantise_activations=quantise_activations and not exact,
    )
    cache = CacheFormat(packed=not exact, index_fp8=index_fp8)
    check_cache(config, cache)
    sizes = StateSizes(max_batch, max_seq_len, min(max_chunk, max_seq_len), config.sliding_window)
    model = DeepseekV4(config, storage, cache, sizes).eval()
    _fill(model, checkpoint.tensor, progress)
    return model


def refit(model: DeepseekV4, state_dict: Mapping[str, Tensor]) -> None:
    """Overwrite all weights from tensors under the released keys, in the format that the model was loaded from.

    Every parameter keeps its address, so compiled graphs and CUDA graphs go on with the new weights. Nothing is written
    unless every key is there, none is left over, and all shapes fit.
    """
    bindings = model.bindings()
    wanted = {key for binding in bindings for key in binding.keys}
    given = {key for key in state_dict if not key.endswith(UNBOUND_SUFFIX)}
    problems = [f"{key} is missing" for key in sorted(wanted - given)]
    problems += [f"{key} is not used" for key in sorted(given - wanted)]
    if not problems:
        problems = [problem for binding in bindings for problem in _misfits(binding, state_dict)]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"refit: {'; '.join(problems[:8])}{more}")
    _fill(model, lambda key: as_stored(state_dict[key]), progress=False)


def _misfits(binding, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Shape and dtype of what would be written against what is there, without computing it."""
    with torch.device("meta"):
        parts = [torch.empty_like(as_stored(state_dict[key]), device="meta") for key in binding.keys]
    value = parts[0] if binding.convert is None else binding.convert(*parts)
    if value.shape == binding.target.shape and _same_kind(value.dtype, binding.target.dtype):
        return []
    wanted, got = (f"{list(tensor.shape)} {str(tensor.dtype)[6:]}" for tensor in (binding.target, value))
    return [f"{binding.keys[0]} must be {wanted}, is {got}"]


def _same_kind(dtype: torch.dtype, target: torch.dtype) -> bool:
    """Floating point weights may change precision, codes and scales may not; integer tables may change width."""
    wide = (torch.float32, torch.bfloat16, torch.float16)
    return dtype == target or (dtype in wide and target in wide) or {dtype, target} <= {torch.int32, torch.int64}


def as_stored(tensor: Tensor) -> Tensor:
    """UE8M0 scales and packed codes as uint8, as `Checkpoint.tensor` returns them."""
    return tensor.view(torch.uint8) if tensor.dtype in (torch.int8, torch.float8_e8m0fnu) else tensor


@torch.no_grad()
def _fill(model: DeepseekV4, tensor: Callable[[str], Tensor], progress: bool) -> None:
    for binding in tqdm(model.bindings(), desc="loading", unit="tensor", disable=not progress, leave=False):
        parts = [tensor(key) for key in binding.keys]
        value = parts[0] if binding.convert is None else binding.convert(*parts)
        binding.target.copy_(value)


def usable_device(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UserError(f"unknown device {device!r}; use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {device} is not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {device} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs"
        )
    return device


def check_sizes(config: ModelConfig, max_batch: int, max_seq_len: int, max_chunk: int) -> None:
    if min(max_batch, max_seq_len, max_chunk) < 1:
        raise UserError(f"batch, length and chunk must be at least 1, got {max_batch}, {max_seq_len}, {max_chunk}")
    if max_seq_len > config.max_position_embeddings:
        raise UserError(
            f"a state of {max_seq_len} positions is longer than the model's {config.max_position_embeddings} "
            "(max_position_embeddings)"
        )


def check_cache(config: ModelConfig, cache: CacheFormat) -> None:
    """Packed pools scale groups of 64 channels, packed index keys want a power of two."""
    if not cache.packed:
        return
    nope, dim = config.head_dim - config.qk_rope_head_dim, config.index_head_dim
    if nope % 64:
        raise UserError(
            f"packed caches need head_dim - qk_rope_head_dim to be a multiple of 64, got {nope}; use exact mode"
        )
    if "csa" in config.layer_kinds and (dim & (dim - 1) or dim % 32):
        raise UserError(
            f"packed index keys need index_head_dim to be a power of two from 32 on, got {dim}; use exact mode"
        )
