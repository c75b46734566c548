"""What the indexers of a model select on a GPU: eager steps, their replay as a CUDA graph, and the CPU's choice."""

import pytest
import torch

from graph_tests.decode.selections import (
    FIRST_STEPS,
    FORMATS,
    assert_as_many_as_there_are,
    check_every_selection,
    checkpoint,
    make,
    selections,
)
from model.decoding import capture_decode

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("form", FORMATS)
def test_replay_selects_what_eager_steps_select(form, tiny, monkeypatch):
    """The same graph at every position: no entry at first, then fewer than the top-k, then more."""
    model, kept = make(tiny, form, "cuda")
    graph = capture_decode(model, (len(FIRST_STEPS),))
    replayed = selections(model, kept, lambda: graph.step(len(FIRST_STEPS)))
    assert_as_many_as_there_are(replayed)
    check_every_selection(form, monkeypatch)
    assert torch.equal(selections(model, kept, model.decode_step), replayed)


def test_exact_steps_select_what_the_cpu_selects(tiny):
    """fp32 and nothing quantised: scores differ by the order of sums, about 1e-6, and no two of them are that close."""
    cpu, cuda = (make(tiny, "plain", device) for device in ("cpu", "cuda"))
    expected, actual = (selections(model, kept, model.decode_step) for model, kept in (cpu, cuda))
    assert torch.equal(actual, expected)
