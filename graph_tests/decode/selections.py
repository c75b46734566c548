"""Decode steps of a tiny model with two CSA layers, and what its indexers select in each of them.

The indexers have the released sizes, for which the kernels use tensor cores. Tokens are given, not sampled, so that two
runs read the same text whatever they compute.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dsv4_ops import ops
from graph_tests.ops.test_indexer_topk import sorted_by_python
from graph_tests.tiny import tiny_checkpoint
from model.attention import Indexer
from model.loading import load
from model.transformer import DeepseekV4

LAYERS, TOPK, RATIO = 5, 4, 4  # layers 1 and 4 are CSA
STEPS = 48
FIRST_STEPS = (0, 7, 30)  # of each sequence; the last one never has more entries than the top-k
FORMATS = {"plain": {"exact": True}, "fp8": {"index_fp8": True}, "fp4": {}}  # of the index keys: arguments of `load`


def checkpoint(directory: Path) -> Path:
    return tiny_checkpoint(directory, "official", layers=LAYERS, index_n_heads=64, index_head_dim=128)


def make(directory: Path, form: str, device: str = "cpu") -> tuple[DeepseekV4, Tensor]:
    """The model, and what its indexers selected last, [layers, B, 1, k], in a buffer that a graph can write."""
    model = load(directory, device=device, max_batch=len(FIRST_STEPS), max_seq_len=64, max_chunk=8, **FORMATS[form])
    indexers = [module for module in model.modules() if isinstance(module, Indexer)]
    kept = torch.empty(len(indexers), len(FIRST_STEPS), 1, TOPK, dtype=torch.int32, device=device)
    for target, indexer in zip(kept, indexers, strict=True):
        indexer.register_forward_hook(partial(_keep, target))
    return model, kept


def _keep(target: Tensor, indexer: Indexer, inputs: tuple, selection: Tensor) -> None:
    target.copy_(selection)


def selections(model: DeepseekV4, kept: Tensor, step: Callable[[], object]) -> Tensor:
    """What `step`, one decode step of all sequences, selects at every step: [STEPS, layers, B, k] on the CPU."""
    state, generator = model.state, torch.Generator().manual_seed(0)
    state.reset()
    taken = []
    for index in range(STEPS):
        state.token.copy_(torch.randint(model.config.vocab_size, state.token.shape, generator=generator))
        state.active.copy_(torch.tensor([index >= first for first in FIRST_STEPS]))
        kept.fill_(-2)
        step()
        taken.append(kept[:, :, 0].clone())
    return torch.stack(taken).cpu()


def assert_as_many_as_there_are(taken: Tensor) -> None:
    """Every complete entry while there are no more than k, then k of them; ascending, and -1 behind them."""
    counts = set()
    for index, layers in enumerate(taken):
        for layer in layers:
            for first, row in zip(FIRST_STEPS, layer.tolist(), strict=True):
                complete = max(index - first + 1, 0) // RATIO
                count = min(complete, TOPK)
                assert row[count:] == [-1] * (TOPK - count), f"step {index}"
                assert row[:count] == sorted(set(row[:count])) and all(0 <= entry < complete for entry in row[:count])
                assert complete > TOPK or row[:count] == list(range(complete))
                counts.add(complete)
    assert counts == set(range(STEPS // RATIO + 1)), "the run goes through every count of entries"


def check_every_selection(form: str, monkeypatch) -> None:
    """From here on every call of the top-k has to be Python's sort of the scores of the same operands."""
    name = f"index_topk_{form}"
    select, score = getattr(ops, name), getattr(ops, f"index_scores_{form}")

    def checked(*arguments) -> Tensor:
        *operands, k = arguments
        selection, scores = select(*arguments), score(*operands).cpu()
        for b, position in enumerate(operands[-3][:, 0].tolist()):
            expected = sorted_by_python(scores[b, 0].tolist(), (position + 1) // RATIO, k)
            assert selection[b, 0].tolist() == expected, f"sequence {b} at position {position}"
        return selection

    monkeypatch.setattr(ops, name, checked)
