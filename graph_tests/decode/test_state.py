"""What sequences that share a state owe each other: nothing. Exact mode is judged by transformers' logits of each
sequence alone; what must not matter at all (stale bytes, block tables, absent rows) is compared bit for bit.
"""

import pytest
import torch
from transformers import DeepseekV4ForCausalLM

from graph_tests.random_checkpoint import small_ratio_config, write_random_checkpoint
from model import load
from model.generation import prefill
from model.logits import compute_logits

# 64 channels without rope: the packed pools' group; window, ratios and top-k small enough for all of them to be crossed
CONFIG = small_ratio_config(head_dim=96, hidden_size=128, q_lora_rank=128)
VOCAB, CHUNK = CONFIG["vocab_size"], 16
LENGTHS = (1, 23, 40, 64)
TOLERANCE = 1e-5  # fp32 on both sides, sums in another order: measured below 1e-6
MODES = {"exact": {"exact": True}, "packed": {}, "packed, FP8 index": {"index_fp8": True}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("state")
    write_random_checkpoint(directory, CONFIG, seed=7)
    return directory


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(VOCAB, (length + 12,), generator=generator) for length in LENGTHS]


@pytest.fixture(scope="module")
def reference(directory, prompts):
    """transformers' fp32 logits [T, vocab] of each sequence alone."""
    judge = DeepseekV4ForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        return [judge(tokens[None], use_cache=False).logits[0] for tokens in prompts]


def make(directory, mode="exact", **options):
    sizes = {"max_batch": len(LENGTHS), "max_seq_len": 128, "max_chunk": CHUNK}
    return load(directory, **MODES[mode], **(sizes | options))


@pytest.fixture(params=MODES)
def model(request, directory):
    return make(directory, request.param)


def relative_error(logits, reference):
    return float(((logits - reference).norm(dim=-1) / reference.norm(dim=-1)).max())


def layer_state(state):
    """Every buffer of pools, compressors and block tables: {name: tensor}."""
    return dict(state.layers.named_buffers())


def snapshot(state):
    return {name: buffer.clone() for name, buffer in layer_state(state).items()}


def changed(state, before):
    """Names of the buffers whose bytes differ."""
    same = {name: torch.equal(raw(buffer), raw(before[name])) for name, buffer in layer_state(state).items()}
    return sorted(name for name, equal in same.items() if not equal)


def raw(tensor):
    return tensor.contiguous().view(torch.uint8)


def own_rows(state, row):
    """Copies of all that belongs to sequence `row`: its pages and its compressor states."""
    own = []
    for layer in state.layers:
        for name, buffer in layer.named_buffers():
            if name.endswith("_state"):
                own.append(buffer[row].clone())
            elif name.endswith("_pool"):
                table = layer.window_table if name == "window_pool" else layer.compressed_table
                own.append(buffer[table[row].long()].clone())
    return own


def poison(state):
    """NaN in every byte format: fp32, BF16, E4M3, UE8M0."""
    for name, buffer in layer_state(state).items():
        if not name.endswith("_table"):
            buffer.view(torch.uint8).fill_(0xFF)


def step(model, tokens, positions):
    """Logits [B, S, vocab] of one call."""
    with torch.no_grad():
        return model.logits(model(tokens, positions.to(torch.int32)))


def rows(prompts, starts, size):
    """tokens and positions [B, size] of prompts from `starts` on; -1 behind their ends and where start is None."""
    tokens = torch.zeros(len(prompts), size, dtype=torch.int64)
    positions = torch.full((len(prompts), size), -1, dtype=torch.int32)
    for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
        if start is not None:
            part = prompt[start : start + size]
            tokens[row, : len(part)] = part
            positions[row, : len(part)] = torch.arange(start, start + len(part))
    return tokens, positions


@torch.no_grad()
def test_ragged_prompts_equal_each_sequence_alone(directory, prompts, reference):
    model = make(directory)
    model.state.reset()
    logits = prefill(model, [prompt[:length].tolist() for prompt, length in zip(prompts, LENGTHS, strict=True)])
    last = torch.stack([alone[length - 1] for alone, length in zip(reference, LENGTHS, strict=True)])
    assert relative_error(logits, last) < TOLERANCE
    assert model.state.position.tolist() == list(LENGTHS)


@torch.no_grad()
def test_decode_steps_at_different_positions_equal_each_sequence_alone(directory, prompts, reference):
    model = make(directory)
    model.state.reset()
    prefill(model, [prompt[:length].tolist() for prompt, length in zip(prompts, LENGTHS, strict=True)])
    for offset in range(10):
        logits = step(model, *rows(prompts, [length + offset for length in LENGTHS], 1))[:, 0]
        wanted = torch.stack([alone[length + offset] for alone, length in zip(reference, LENGTHS, strict=True)])
        assert relative_error(logits, wanted) < TOLERANCE, offset


def test_ragged_chunks_at_different_starts_equal_each_sequence_alone(directory, prompts, reference):
    """One call holds a prompt's first chunk, another's middle, another's short end, and a sequence that sits out."""
    model = make(directory)
    step(model, *rows(prompts, [None, 0, None, None], 9))
    step(model, *rows(prompts, [None, None, 0, 0], CHUNK))
    step(model, *rows(prompts, [None, None, None, 16], CHUNK))
    starts = [0, 9, None, 32]
    tokens, positions = rows(prompts, starts, CHUNK)
    logits = step(model, tokens, positions)
    for row, start in enumerate(starts):
        count = int((positions[row] >= 0).sum())
        if count:
            assert relative_error(logits[row, :count], reference[row][start : start + count]) < TOLERANCE, row


@pytest.mark.parametrize("chunk", (1, 2, 5, 8, 64))
def test_the_chunk_size_does_not_matter_in_exact_mode(directory, prompts, reference, chunk):
    model = make(directory, max_batch=1, max_chunk=chunk)
    logits = compute_logits(model, prompts[1][None], len(prompts[1]))
    assert relative_error(logits[0], reference[1]) < TOLERANCE


@pytest.mark.parametrize("size", (1, 7))
def test_a_call_without_any_token_writes_nothing(model, prompts, size):
    step(model, *rows(prompts, [0] * len(prompts), CHUNK))
    before = snapshot(model.state)
    step(model, torch.zeros(len(prompts), size, dtype=torch.int64), torch.full((len(prompts), size), -1))
    assert changed(model.state, before) == []


def test_an_absent_sequence_is_neither_written_nor_read(model, prompts):
    """Sequence 1 sits out a call: its state keeps every byte, the others get the same logits with any token there."""
    step(model, *rows(prompts, [0] * len(prompts), CHUNK))
    before, others = own_rows(model.state, 1), own_rows(model.state, 2)
    saved = snapshot(model.state)
    tokens, positions = rows(prompts, [None, None, 16, 16], CHUNK)
    first = step(model, tokens, positions)
    assert all(torch.equal(raw(a), raw(b)) for a, b in zip(before, own_rows(model.state, 1), strict=True))
    assert not all(torch.equal(raw(a), raw(b)) for a, b in zip(others, own_rows(model.state, 2), strict=True))
    for name, buffer in layer_state(model.state).items():
        buffer.copy_(saved[name])
    tokens[1] = torch.arange(CHUNK) + 3
    assert torch.equal(step(model, tokens, positions)[2:], first[2:])


def test_padding_behind_a_short_row_writes_nothing(model, prompts):
    """Rows behind the end of a sequence hold any token; the state is that of the same call with other tokens there."""
    tokens, positions = rows(prompts, [0, 0, 0, 0], CHUNK)
    first, after = step(model, tokens, positions), snapshot(model.state)
    for name, buffer in layer_state(model.state).items():
        if not name.endswith("_table"):
            buffer.zero_()
    tokens[positions < 0] = 5
    again = step(model, tokens, positions)
    assert changed(model.state, after) == []
    assert torch.equal(again[positions >= 0], first[positions >= 0])


def test_prefill_of_length_zero_leaves_a_sequence_where_it_is(model, prompts):
    step(model, *rows(prompts, [0] * len(prompts), CHUNK))
    model.state.position.fill_(13)
    before = own_rows(model.state, 0)
    with torch.no_grad():
        model.prefill(torch.zeros(len(prompts), 4, dtype=torch.int64), torch.tensor([0, 4, 0, 1]))
    assert model.state.position.tolist() == [13, 17, 13, 14]
    assert all(torch.equal(raw(a), raw(b)) for a, b in zip(before, own_rows(model.state, 0), strict=True))


def test_a_sequence_reads_nothing_of_what_stood_there_before(model, prompts):
    """A state full of NaN gives what a fresh one gives: nothing is read that this sequence has not written."""
    calls = [rows(prompts, [start] * len(prompts), size) for start, size in ((0, CHUNK), (CHUNK, CHUNK), (32, 1))]
    fresh = [step(model, *call) for call in calls]
    poison(model.state)
    for call, wanted in zip(calls, fresh, strict=True):
        valid = call[1] >= 0
        assert torch.equal(step(model, *call)[valid], wanted[valid])
        assert wanted[valid].isfinite().all()


def test_a_short_sequence_after_a_long_one_equals_a_fresh_state(model, prompts):
    short = [prompt[:6][None] for prompt in prompts]
    tokens = torch.cat(short)
    fresh = compute_logits(model, tokens, 3)
    compute_logits(model, torch.stack([prompt.repeat(76)[:76] for prompt in prompts]), 70)
    assert torch.equal(compute_logits(model, tokens, 3), fresh)


def test_permuted_block_tables_give_the_same_logits(directory, model, prompts):
    """Any assignment of pages to sequences will do. 600 positions: several pages of each pool."""
    model.allocate(type(model.state.sizes)(len(prompts), 600, 100, CONFIG["sliding_window"]))
    tokens = torch.stack([prompt.repeat(76)[:76] for prompt in prompts])
    plain = compute_logits(model, tokens, 70)
    generator = torch.Generator().manual_seed(9)
    for layer in model.state.layers:
        for name, table in layer.named_buffers():
            if name.endswith("_table"):
                order = torch.randperm(table.numel(), generator=generator)
                assert table.numel() > len(prompts)
                table.copy_(table.flatten()[order].view_as(table))
    assert torch.equal(compute_logits(model, tokens, 70), plain)


@torch.no_grad()
@pytest.mark.parametrize("mode", ("exact", "packed"))
def test_replaying_the_recorded_experts_gives_the_same_output(directory, mode):
    """The choice is recorded by the formula: the best `k` of sqrt(softplus(y W^T)) + bias, best first."""
    moe, k = make(directory, mode).blocks[2].ffn, CONFIG["num_experts_per_tok"]
    y = torch.randn(2, 9, CONFIG["hidden_size"], generator=torch.Generator().manual_seed(10)).to(moe.gate.dtype)
    free = torch.full((2, 9, k), -1, dtype=torch.int32)
    score = torch.nn.functional.softplus(y.float() @ moe.gate.float().T).sqrt()
    chosen = (score + moe.bias).topk(k).indices.to(torch.int32)
    assert torch.equal(moe(y, chosen), moe(y, free))
    others = (chosen + 1) % CONFIG["n_routed_experts"]
    assert not torch.equal(moe(y, others), moe(y, free))
