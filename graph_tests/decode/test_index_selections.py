"""What the indexers of a model select, step by step, while the count of entries passes the top-k."""

import pytest
import torch

from graph_tests.decode.selections import (
    FORMATS,
    assert_as_many_as_there_are,
    check_every_selection,
    checkpoint,
    make,
    selections,
)
from graph_tests.graphs.rewritten import FusedThenEager


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("form", FORMATS)
def test_a_step_selects_the_best_entries_that_are_complete(form, tiny, monkeypatch):
    model, kept = make(tiny, form)
    check_every_selection(form, monkeypatch)
    taken = selections(model, kept, model.decode_step)
    assert_as_many_as_there_are(taken)
    first, second = taken[-1, 0], taken[-1, 1]
    assert not torch.equal(first, second), "the layers select entries of their own"


@pytest.mark.parametrize("form", FORMATS)
def test_a_graph_selects_what_eager_steps_select(form, tiny):
    """The blocks as graphs, rewritten by the passes: the buffer is written from inside them."""
    model, kept = make(tiny, form)
    eager = selections(model, kept, model.decode_step)
    torch._dynamo.reset()
    model.compile(backend=FusedThenEager())
    assert torch.equal(selections(model, kept, model.decode_step), eager)
