"""Teacher-forced logits: prefill some positions, decode the rest, for comparisons with other engines."""

import os
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from model.errors import UserError
from model.new_directory import default_mode
from model.transformer import DeepseekV4


def read_tokens(path: Path, vocab: int) -> Tensor:
    """int64 `tokens` [B, T] of a safetensors file, all in range."""
    try:
        with safe_open(path, framework="pt") as file:
            if "tokens" not in file.keys():
                raise UserError(f"{path} must hold a tensor `tokens`, holds {', '.join(file.keys()) or 'nothing'}")
            tokens = file.get_tensor("tokens")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32) or 0 in tokens.shape:
        raise UserError(f"{path}: tokens must be int64 [B, T] with B, T >= 1, is {tokens.dtype} {list(tokens.shape)}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab:
        raise UserError(f"{path}: token {low if low < 0 else high} is out of range, the vocabulary has {vocab} tokens")
    return tokens.to(torch.int64)


@torch.no_grad()
def compute_logits(model: DeepseekV4, tokens: Tensor, prefill: int, progress: bool = False) -> Tensor:
    """tokens [B, T] -> logits [B, T, vocab] f32: positions below `prefill` in chunks, the others one step at a time."""
    state, sizes = model.state, model.state.sizes
    state.reset()
    device, (batch, length) = state.token.device, tokens.shape
    padded = torch.zeros(sizes.max_batch, length, dtype=torch.int64)
    padded[:batch] = tokens
    present = (torch.arange(sizes.max_batch) < batch)[:, None]
    starts = [*range(0, prefill, sizes.max_chunk), *range(prefill, length)]
    logits = torch.empty(batch, length, model.config.vocab_size)
    for start, end in zip(
        tqdm(starts, desc="logits", unit="call", disable=not progress, leave=False), [*starts[1:], length], strict=True
    ):
        positions = torch.where(present, torch.arange(start, end, dtype=torch.int32), -1)
        streams = model(padded[:, start:end].to(device), positions.to(device))
        logits[:, start:end] = model.logits(streams)[:batch].cpu()
    return logits


def write_logits(path: Path, logits: Tensor) -> None:
    """Write the file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({"logits": logits}, temporary)
        temporary.chmod(default_mode())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, (OSError, SafetensorError)):
            raise UserError(f"{path} cannot be written: {error}") from None
        raise
