"""The draft (MTP) block in exact mode. transformers ignores mtp.*, so the judge is composed of its modules: a one-layer
model of the block's weights whose first layer gets the draft's input in place of the embedding.
"""

import pytest
import torch
from safetensors.torch import save_file
from transformers import DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RMSNorm

from graph_tests.random_checkpoint import tiny_config, write_random_checkpoint
from model import load

CONFIG = tiny_config(num_nextn_predict_layers=1, compress_ratios=[0, 4, 128, 4, 0])
BATCH, LENGTH = 2, 40
TOLERANCE = 1e-5  # fp32 on both sides; only the order of sums differs (measured 3e-7 to 7e-7)
SHARED = ("embed.weight", "head.weight")
HEAD = ("hc_head_fn", "hc_head_base", "hc_head_scale", "norm.weight")  # each draft has its own
ONLY_DRAFTS = ("enorm.weight", "hnorm.weight", "e_proj.weight", "h_proj.weight")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("draft")
    return directory, write_random_checkpoint(directory, CONFIG, seed=5, dtype=torch.float32)


@pytest.fixture(scope="module")
def model(checkpoint):
    return load(checkpoint[0], exact=True, max_batch=BATCH, max_seq_len=LENGTH)


@pytest.fixture(scope="module")
def judge(checkpoint, tmp_path_factory):
    """transformers' model of one sliding, scored layer with the weights of mtp.0, and these under their names there."""
    directory, drafts = tmp_path_factory.mktemp("judge"), {key: checkpoint[1][key] for key in SHARED}
    for key, value in checkpoint[1].items():
        if key.startswith("mtp.0."):
            name = key.removeprefix("mtp.0.")
            drafts[name if name in HEAD or name in ONLY_DRAFTS else f"layers.0.{name}"] = value
    config = {"num_hidden_layers": 1, "num_hash_layers": 0, "compress_ratios": [0], "num_nextn_predict_layers": 0}
    wanted = write_random_checkpoint(directory, CONFIG | config, dtype=torch.float32)
    save_file({key: drafts[key] for key in wanted}, directory / "model.safetensors", metadata={"format": "pt"})
    twin = DeepseekV4ForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager")
    return twin.eval(), drafts


def rms_norm(x, weight):
    norm = DeepseekV4RMSNorm(len(weight), CONFIG["rms_norm_eps"])
    norm.weight = torch.nn.Parameter(weight)
    return norm(x)


@pytest.fixture(scope="module")
def trunk(model):
    """Tokens [B, T + 1], the trunk's streams of the first T, and their positions."""
    tokens = torch.randint(CONFIG["vocab_size"], (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(6))
    positions = torch.arange(LENGTH, dtype=torch.int32).expand(BATCH, -1).contiguous()
    model.state.reset()
    with torch.no_grad():
        return tokens, model(tokens[:, :-1], positions), positions


@pytest.fixture(scope="module")
def expected(judge, trunk):
    """X0_k = Wep RMS(E[next]; enorm) + Whp RMS(X_k; hnorm), then layer, head and norm of the judge."""
    (twin, drafts), (tokens, streams, _) = judge, trunk
    following = tokens[:, 1:]
    with torch.no_grad():
        e = rms_norm(twin.model.embed_tokens(following), drafts["enorm.weight"]) @ drafts["e_proj.weight"].T
        h = rms_norm(streams, drafts["hnorm.weight"]) @ drafts["h_proj.weight"].T
        start = e[:, :, None] + h
        twin.model.layers[0].register_forward_pre_hook(lambda layer, arguments: (start, *arguments[1:]))
        return twin(following, use_cache=False).logits


def relative_error(logits, reference):
    return float(((logits - reference).norm(dim=-1) / reference.norm(dim=-1)).max())


@torch.no_grad()
def test_draft_logits_of_a_whole_chunk(model, trunk, expected):
    tokens, streams, positions = trunk
    logits = model.draft_logits(streams, tokens[:, 1:], positions)
    assert relative_error(logits, expected) < TOLERANCE


@torch.no_grad()
def test_draft_logits_token_by_token(model, trunk, expected):
    """Past the window of 8: each step sees the drafts' own entries of the steps before it."""
    tokens, streams, positions = trunk
    model.state.layers[-1].window_pool.fill_(float("nan"))
    steps = [
        model.draft_logits(streams[:, row : row + 1], tokens[:, row + 1 : row + 2], positions[:, row : row + 1])
        for row in range(LENGTH)
    ]
    assert relative_error(torch.cat(steps, 1), expected) < TOLERANCE


@torch.no_grad()
def test_draft_logits_in_odd_chunks(model, trunk, expected):
    tokens, streams, positions = trunk
    model.state.layers[-1].window_pool.fill_(float("nan"))
    bounds = [0, 1, 8, 9, 22, 37, LENGTH]
    parts = [
        model.draft_logits(streams[:, a:b], tokens[:, a + 1 : b + 1], positions[:, a:b])
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    assert relative_error(torch.cat(parts, 1), expected) < TOLERANCE


@torch.no_grad()
def test_draft_leaves_the_state_of_the_trunk_alone(model, trunk):
    tokens, streams, positions = trunk
    own = {id(buffer) for buffer in model.state.layers[-1].buffers()}
    before = [(buffer, buffer.clone()) for buffer in model.state.buffers() if id(buffer) not in own]
    model.draft_logits(streams, tokens[:, 1:], positions)
    assert all(torch.equal(buffer, saved) for buffer, saved in before)


@torch.no_grad()
def test_absent_rows_of_a_draft_write_nothing(model, trunk, expected):
    """Sequence 1 has only 11 rows: its logits up to there and those of sequence 0 stay what they are."""
    tokens, streams, positions = trunk
    pool = model.state.layers[-1].window_pool
    pool.fill_(7.0)
    short = torch.where((torch.arange(BATCH)[:, None] == 1) & (positions >= 11), -1, positions)
    logits = model.draft_logits(streams, tokens[:, 1:], short)
    assert relative_error(logits[0], expected[0]) < TOLERANCE
    assert relative_error(logits[1, :11], expected[1, :11]) < TOLERANCE
    entries = pool[model.state.layers[-1].window_table[1].long()].view(-1, CONFIG["head_dim"])
    assert (entries[:11] != 7).all() and (entries[11:] == 7).all()
