"""The decode step, sampling included, never asks for device data: it runs on tensors that have none."""

import pytest
import torch

from graph_tests.host_reads import HostReadError, RefuseHostReads
from graph_tests.tiny import FORMATS, tiny_checkpoint
from model.loading import load
from model.state import DecodeState


def meta_model(tmp_path, weight_format: str, **options):
    model = load(tiny_checkpoint(tmp_path, weight_format), max_batch=3, max_seq_len=64, max_chunk=8, **options)
    return model.to("meta")


@pytest.mark.parametrize("weight_format", FORMATS)
@torch.no_grad()
def test_decode_step_makes_no_host_read(tmp_path, weight_format):
    model = meta_model(tmp_path, weight_format)
    with RefuseHostReads() as mode:
        tokens = model.decode_step()
    assert tokens.device.type == "meta" and tokens.shape == (3,)
    ran = {name for name in mode.calls if name.startswith("dsv4.")}
    expected = {"sample", "gate", "hc_post_pre_rms_norm", "hc_post", "index_topk_fp4", "sparse_attention_selected"}
    assert {f"dsv4.{name}" for name in expected} <= ran


@pytest.mark.parametrize("options", [{"exact": True}, {"index_fp8": True}], ids=str)
@torch.no_grad()
def test_other_cache_formats_make_no_host_read(tmp_path, options):
    model = meta_model(tmp_path, "bf16", **options)
    with RefuseHostReads():
        model.decode_step()


@torch.no_grad()
def test_prefill_makes_no_host_read(tmp_path):
    model = meta_model(tmp_path, "official")
    with RefuseHostReads():
        tokens, lengths = (torch.zeros(shape, dtype=torch.int64, device="meta") for shape in ((3, 8), (3,)))
        logits = model.prefill(tokens, lengths)
    assert logits.shape == (3, model.config.vocab_size)


def broken_item(state: DecodeState):
    return state.position.max().item()


def broken_branch(state: DecodeState):
    if (state.position > 3).any():
        state.position.add_(1)


def broken_mask(state: DecodeState):
    return state.token[state.active]


def broken_nonzero(state: DecodeState):
    return state.active.nonzero()


def broken_equal(state: DecodeState):
    return torch.equal(state.position, state.top_k)


@pytest.mark.parametrize("broken", [broken_item, broken_branch, broken_mask, broken_nonzero, broken_equal])
def test_the_mode_refuses_every_kind_of_read(tmp_path, broken):
    """On real tensors, which have data to read: here only the mode can object, not the meta device."""
    model = load(tiny_checkpoint(tmp_path, "bf16"), max_batch=3, max_seq_len=64, max_chunk=8)
    broken(model.state)
    with pytest.raises(HostReadError), RefuseHostReads():
        broken(model.state)


def test_the_mode_refuses_uploads(tmp_path):
    state = meta_model(tmp_path, "bf16").state
    with pytest.raises(HostReadError, match="between"), RefuseHostReads():
        state.token + torch.tensor([1, 2, 3]).to("meta")
