"""What the indexer selects among keys of the built-in model, against fp64 scores of the same operands."""

import pytest
import torch

from dsv4_ops import ops
from graph_tests.cuda.indexer_inputs import RATIO, dequantised
from graph_tests.cuda.kernel_checks import on_cuda
from model import load
from model.cli import BUILTIN
from model.tokenizer import Tokenizer

pytestmark = pytest.mark.cuda

CHUNK, CHUNKS = 128, 6


def arguments_of_the_last_chunk(form: str, monkeypatch: pytest.MonkeyPatch) -> tuple:
    """Arguments of index_topk where the model, on the CPU, reads the start of its evaluation text."""
    name = f"index_topk_{form}"
    select, calls = getattr(ops, name), []
    monkeypatch.setattr(ops, name, lambda *arguments: calls.append(arguments) or select(*arguments))
    model = load(BUILTIN, max_seq_len=CHUNK * CHUNKS, max_chunk=CHUNK, index_fp8=form == "fp8")
    text = Tokenizer(BUILTIN, model.config.bos_token_id).encode((BUILTIN / "eval.txt").read_text())
    for chunk in torch.tensor(text[: CHUNK * CHUNKS]).split(CHUNK):
        model.prefill(chunk[None], torch.tensor([CHUNK], dtype=torch.int32))
    return calls[-1]


@pytest.mark.parametrize("form", ["fp8", "fp4"])
def test_recall_of_picks_among_keys_of_the_model(form, monkeypatch):
    """99.9 % of the picks, at the model's k and at smaller ones."""
    *arguments, most = arguments_of_the_last_chunk(form, monkeypatch)
    q, keys = dequantised(form, tuple(arguments))
    scores = (torch.einsum("bshd,bcd->bshc", q, keys).relu() * arguments[-6][..., None].double()).sum(2)
    seen = (arguments[-3] + 1) // RATIO
    scores = scores[0].masked_fill(torch.arange(keys.shape[1]) >= seen[0, :, None], -torch.inf)
    for k in (most, most // 2, most // 8):
        best = scores.topk(k).indices
        picks = getattr(torch.ops.dsv4, f"index_topk_{form}")(*on_cuda(tuple(arguments)), k).cpu()[0]
        found = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(picks, best, strict=True))
        assert found >= 0.999 * k * CHUNK
