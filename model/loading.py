"""Load a checkpoint directory into a model, and refit a live model with new weights at the same addresses."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dsv4_ops.kernels import require_kernels
from model.checkpoint import Checkpoint, validate
from model.checkpoint_keys import INTEGER_CLASS, Expected, expected_keys
from model.config import ModelConfig
from model.errors import CheckpointError, UserError
from model.state import CacheFormat, StateSizes
from model.storage import Storage
from model.transformer import DeepseekV4
from model.weight_formats import has_mtp

DEFAULT_CHUNK = 256
# Activations are scaled by their own row, not by the calibrated scale that some NVFP4 checkpoints carry.
UNBOUND_SUFFIX = ".input_scale"
TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}


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
    Raises CheckpointError if a tensor is missing, unused, mis-shaped or unreadable, UserError for a missing device.
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
    expected = expected_keys(model.config, replace(model.storage.formats, input_scales=False))
    ignored = ("mtp.",) if model.config.has_dspark_drafter else ()
    given = {key for key in state_dict if not key.endswith(UNBOUND_SUFFIX) and not key.startswith(ignored)}
    problems = [f"{key} is missing" for key in sorted(expected.keys() - given)]
    problems += [f"{key} is not used" for key in sorted(given - expected.keys())]
    if not problems:
        problems = list(_misfits(expected, state_dict, model.config.n_routed_experts))
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"refit: {'; '.join(problems[:8])}{more}")
    _fill(model, lambda key: as_stored(state_dict[key]), progress=False)


def _misfits(expected: Mapping[str, Expected], state_dict: Mapping[str, Tensor], experts: int) -> Iterator[str]:
    """Tensors whose shape or storage type a checkpoint of this format could not have, and tables of unknown experts."""
    for key, wanted in expected.items():
        tensor = state_dict[key]
        same_shape = tuple(tensor.shape) == wanted.shape or (wanted.shape == () and tuple(tensor.shape) == (1,))
        if not same_shape or tensor.dtype not in [TORCH_DTYPES[dtype] for dtype in wanted.dtypes]:
            got = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            yield f"{key} must be {list(wanted.shape)} {' or '.join(wanted.dtypes)}, is {got}"
        elif wanted.dtypes == INTEGER_CLASS and not 0 <= int(tensor.min()) <= int(tensor.max()) < experts:
            yield f"{key} must hold expert ids 0..{experts - 1}, holds {int(tensor.min())}..{int(tensor.max())}"


def as_stored(tensor: Tensor) -> Tensor:
    """UE8M0 scales and packed codes as uint8, as `Checkpoint.tensor` returns them."""
    return tensor.view(torch.uint8) if tensor.dtype in (torch.int8, torch.float8_e8m0fnu) else tensor


@torch.no_grad()
def _fill(model: DeepseekV4, tensor: Callable[[str], Tensor], progress: bool) -> None:
    for binding in tqdm(model.bindings(), desc="loading", unit="tensor", disable=not progress, leave=False):
        parts = [tensor(key) for key in binding.keys]
        value = parts[0] if binding.convert is None else binding.convert(*parts)
        binding.target.copy_(value)
    if model.storage.device.type == "cuda":  # kernels read weights before they wait for the work in front of them
        torch.cuda.synchronize(model.storage.device)


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
    if device.type == "cuda":
        require_kernels()
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
