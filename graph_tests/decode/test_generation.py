"""Generation and its step: tokens are transformers' greedy ones, sampling depends on seed and position alone, finished
rows are left alone, and the output ring holds what was yielded.
"""

import json
import shutil

import pytest
import torch
from transformers import DeepseekV4ForCausalLM

from graph_tests.random_checkpoint import small_ratio_config, write_random_checkpoint
from model import UserError, load
from model.generation import Sampling, generate
from model.state import OUTPUT_RING_STEPS

CONFIG = small_ratio_config(eos_token_id=None)
VOCAB = CONFIG["vocab_size"]
PROMPTS = [[5, 9, 2], [7], list(range(20, 41))]
GREEDY = Sampling()
RANDOM = Sampling(temperature=1.0, top_k=40, top_p=0.9, seed=3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("generation")
    write_random_checkpoint(directory, CONFIG, seed=11, dtype=torch.float32)
    return directory


def make(directory, max_batch=3, max_seq_len=128, max_chunk=8):
    return load(directory, exact=True, max_batch=max_batch, max_seq_len=max_seq_len, max_chunk=max_chunk)


@pytest.fixture(scope="module")
def model(directory):
    return make(directory)


def sequences(model, prompts, count, sampling):
    """The tokens of each prompt, as one list each."""
    result = [[] for _ in prompts]
    for sequence, token in generate(model, prompts, count, sampling):
        result[sequence].append(token)
    return result


def bytes_of(state):
    return [buffer.clone().view(torch.uint8) for buffer in state.layers.buffers()]


def test_greedy_tokens_are_those_of_transformers(directory, model):
    judge = DeepseekV4ForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager").eval()
    for prompt, tokens in zip(PROMPTS, sequences(model, PROMPTS, 24, GREEDY), strict=True):
        read = torch.tensor([prompt + tokens[:-1]])
        with torch.no_grad():
            chosen = judge(read, use_cache=False).logits[0, len(prompt) - 1 :].argmax(-1)
        assert tokens == chosen.tolist()


def test_sampled_tokens_have_the_probabilities_of_transformers(directory):
    """First tokens of 3000 seeds against softmax(logits / T): chi-square over the tokens expected 5 times or more."""
    judge = DeepseekV4ForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        probability = (judge(torch.tensor([PROMPTS[0]]), use_cache=False).logits[0, -1] / 0.7).softmax(-1)
    count, batch = 3000, 500
    model = make(directory, max_batch=batch, max_seq_len=4)
    drawn = torch.zeros(VOCAB)
    for start in range(0, count, batch):
        tokens = sequences(model, [PROMPTS[0]] * batch, 1, Sampling(temperature=0.7, seed=start))
        drawn += torch.bincount(torch.tensor(tokens).flatten(), minlength=VOCAB)
    expected = probability * count
    often = expected >= 5
    statistic = ((drawn - expected)[often] ** 2 / expected[often]).sum()
    freedom = int(often.sum())
    # A chi-square variable of n degrees has mean n and variance 2n; the seeds are fixed, so it cannot be a flake.
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(model):
    first = sequences(model, PROMPTS, 16, RANDOM)
    assert sequences(model, PROMPTS, 16, RANDOM) == first
    other = sequences(model, PROMPTS, 16, Sampling(1.0, 40, 0.9, seed=4))
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_sampled_tokens_do_not_depend_on_the_place_in_the_batch(directory, model):
    """Sequence i draws from seed + i: alone with that seed, in another row or another state it is the same."""
    together = sequences(model, PROMPTS, 16, RANDOM)
    alone = make(directory, max_batch=1)
    for row, prompt in enumerate(PROMPTS):
        shifted = Sampling(RANDOM.temperature, RANDOM.top_k, RANDOM.top_p, RANDOM.seed + row)
        assert sequences(alone, [prompt], 16, shifted) == [together[row]]


def test_a_sampled_token_depends_on_its_position_not_on_the_steps_before_it(model):
    """Reading half of the tokens as part of the prompt goes on with the other half."""
    whole = sequences(model, PROMPTS, 12, RANDOM)
    longer = [prompt + tokens[:5] for prompt, tokens in zip(PROMPTS, whole, strict=True)]
    assert sequences(model, longer, 7, RANDOM) == [tokens[5:] for tokens in whole]


def test_a_state_with_room_to_spare_generates_the_same(directory, model):
    assert sequences(make(directory, max_batch=5), PROMPTS, 12, RANDOM) == sequences(model, PROMPTS, 12, RANDOM)


def test_top_k_one_and_a_tiny_top_p_are_greedy(model):
    greedy = sequences(model, PROMPTS, 12, GREEDY)
    assert sequences(model, PROMPTS, 12, Sampling(temperature=2.0, top_k=1)) == greedy
    assert sequences(model, PROMPTS, 12, Sampling(temperature=2.0, top_p=1e-6)) == greedy


def test_the_ring_holds_the_last_tokens_that_generate_yielded(model):
    count = OUTPUT_RING_STEPS + 9
    tokens = torch.tensor(sequences(model, PROMPTS, count, RANDOM))
    assert tokens.shape == (len(PROMPTS), count)
    assert int(model.state.step) == count
    steps = torch.arange(count - OUTPUT_RING_STEPS, count)
    assert torch.equal(model.state.output[steps % OUTPUT_RING_STEPS], tokens[:, steps].T)


def test_tokens_come_in_steps_and_in_the_order_of_the_prompts(model):
    order = [sequence for sequence, _ in generate(model, PROMPTS, 4, GREEDY)]
    assert order == [0, 1, 2] * 4


@torch.no_grad()
def test_end_of_sentence_deactivates_its_row_alone(directory, model, tmp_path):
    plain = sequences(model, PROMPTS, 24, GREEDY)
    stop = plain[0][5]
    shutil.copytree(directory, tmp_path / "with-eos")
    (tmp_path / "with-eos" / "config.json").write_text(json.dumps(CONFIG | {"eos_token_id": [stop, VOCAB - 1]}))
    stopping = make(tmp_path / "with-eos")
    wanted = [tokens[: next((i for i, t in enumerate(tokens) if t in (stop, VOCAB - 1)), 24)] for tokens in plain]
    assert len(wanted[0]) <= 5 and max(len(tokens) for tokens in wanted) > len(wanted[0])
    assert sequences(stopping, PROMPTS, 24, GREEDY) == wanted
    assert stopping.state.active.tolist() == [len(tokens) == 24 for tokens in wanted]
    written = [(stopping.state.output[:, row] >= 0).sum() for row in range(3)]
    assert written == [min(len(tokens) + 1, 24) for tokens in wanted]  # the ring has the token that ended it, too


@torch.no_grad()
def test_a_step_after_the_end_writes_nothing(model):
    sequences(model, PROMPTS, 3, GREEDY)
    model.state.active.fill_(False)
    before, position, token = bytes_of(model.state), model.state.position.clone(), model.state.token.clone()
    assert model.decode_step().tolist() == [-1, -1, -1]
    assert all(torch.equal(a, b) for a, b in zip(before, bytes_of(model.state), strict=True))
    assert torch.equal(model.state.position, position) and torch.equal(model.state.token, token)


@torch.no_grad()
def test_a_full_state_deactivates_a_row_before_it_writes(directory, model):
    """10 positions: the sequence of 3 reads 7 tokens more, then its step emits -1; the other one goes on."""
    plain = sequences(model, PROMPTS[:2], 12, GREEDY)
    small = make(directory, max_batch=2, max_seq_len=10)
    tokens = sequences(small, PROMPTS[:2], 2, GREEDY)
    for _ in range(6):
        emitted = small.decode_step()
        for row, token in enumerate(emitted.tolist()):
            tokens[row].append(token)
    assert tokens == [row[:8] for row in plain]  # positions 3 ... 10: the last one can be sampled, not read
    assert small.decode_step().tolist() == [-1, plain[1][8]]
    assert small.state.active.tolist() == [False, True]
    assert small.state.position.tolist() == [10, 9]


@torch.no_grad()
def test_a_full_state_is_left_as_it_is(directory):
    small = make(directory, max_batch=1, max_seq_len=10)
    sequences(small, PROMPTS[:1], 7, GREEDY)
    small.decode_step()
    before = bytes_of(small.state)
    assert small.decode_step().tolist() == [-1]
    assert all(torch.equal(a, b) for a, b in zip(before, bytes_of(small.state), strict=True))
    assert small.state.position.tolist() == [10] and small.state.active.tolist() == [False]


@pytest.mark.parametrize(
    "prompts, count, message",
    (
        ([], 4, "no prompt"),
        ([[1]] * 4, 4, "4 prompts do not fit into a state of 3"),
        ([[1], []], 4, "prompt 1 has no token"),
        ([[1, VOCAB]], 4, f"token {VOCAB} is out of range"),
        ([[-1]], 4, "token -1 is out of range"),
        ([[1] * 120], 9, "needs 129 positions, the state has 128"),
        ([[1]], 0, "max-new-tokens"),
    ),
)
def test_what_does_not_fit_is_refused_before_anything_is_written(model, prompts, count, message):
    sequences(model, PROMPTS, 3, GREEDY)
    before = [buffer.clone() for buffer in model.state.buffers()]
    with pytest.raises(UserError, match=message):
        sequences(model, prompts, count, GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state.buffers(), strict=True))


@pytest.mark.parametrize(
    "setting",
    (
        {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")},
        {"top_k": -1}, {"top_k": 2**31}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_p": float("nan")},
        {"seed": 2**63}, {"seed": -(2**63) - 1},
    ),
)  # fmt: skip
def test_sampling_settings_out_of_range_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        Sampling(**setting)
