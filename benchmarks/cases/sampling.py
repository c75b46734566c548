"""Sampling with all of its settings in use."""

from collections.abc import Iterator

import torch

from benchmarks.case import Case
from benchmarks.floors import Traffic
from benchmarks.inputs import Inputs
from benchmarks.shapes import MOST_DECODE_ROWS, Widths


def cases(w: Widths, tokens: int) -> Iterator[Case]:
    if tokens > MOST_DECODE_ROWS:
        return

    def make(i: Inputs) -> tuple:
        def each(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((tokens,), value, dtype=dtype, device=i.device)

        logits = i.normal(tokens, w.vocab_size, dtype=torch.float32, scale=2.0)
        settings = each(0.8, torch.float32), each(50, torch.int32), each(0.95, torch.float32)
        return logits, *settings, torch.arange(tokens, device=i.device), each(7, torch.int64)

    settings = 3 * 4 + 2 * 8
    read = tokens * (4 * w.vocab_size + settings)
    yield Case("sample", tokens, f"V {w.vocab_size}", Traffic(read, 8 * tokens), make)
