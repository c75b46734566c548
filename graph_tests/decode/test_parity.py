"""Logits in exact mode against transformers' DeepseekV4ForCausalLM in fp32, on random checkpoints in both spellings of
config.json: whole prompts, odd chunks, token by token, and a prompt followed by decode steps.
"""

from dataclasses import dataclass

import pytest
import torch
from transformers import DeepseekV4ForCausalLM

from graph_tests.random_checkpoint import small_ratio_config, tiny_config, write_random_checkpoint
from model import load
from model.logits import compute_logits

BATCH = 2
CHUNK = 9  # of the narrow model: no divisor of any ratio, and its window ring of 64 wraps within every case
# Both sides compute in fp32; sums in another order leave 3e-7 to 1e-6 on these models. Half of the Sinkhorn iterations
# moves each case by 9e-5 or more; hc_eps = 0, the least visible constant, three of the five by 1.5e-5 or more.
TOLERANCE = 1e-5
YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}
WINDOW, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"

# name: (config.json, seed, tokens, of these by decode steps from the start, prompt length before decode steps)
CASES = {
    "small ratios": (small_ratio_config(rope_scaling=YARN), 0, 140, 72, 126),
    "two streams, ratio 2, plain rope": (
        small_ratio_config(
            csa=2, hca=6, hc_mult=2, num_hash_layers=0, rope_scaling=None, num_attention_heads=4, o_groups=4,
            o_lora_rank=16, swiglu_limit=1.0,
        ), 1, 140, 40, 126,
    ),
    "odd widths, heavy layers first": (
        small_ratio_config(
            csa=4, hca=16, hidden_size=40, moe_intermediate_size=24, num_attention_heads=6, o_groups=3, head_dim=48,
            qk_rope_head_dim=16, q_lora_rank=20, index_head_dim=24, index_topk=3, n_routed_experts=6,
            num_experts_per_tok=3, num_hash_layers=2, routed_scaling_factor=2.5, sliding_window=5, hc_mult=3,
            hc_sinkhorn_iters=7, num_hidden_layers=5, compress_rope_theta=4000.0, rope_scaling=YARN,
        ) | {"layer_types": [HEAVY, HEAVY, SPARSE, WINDOW, SPARSE]}, 2, 140, 40, 126,
    ),
    "released ratios": (
        tiny_config(sliding_window=128, index_topk=8, num_hash_layers=2, rope_scaling=YARN), 3, 310, 20, 250
    ),
    "released ratios, plain rope, every entry selected": (
        tiny_config(
            sliding_window=128, index_topk=512, rope_scaling=None, compress_ratios=[128, 128, 4], num_hidden_layers=3
        ), 4, 270, 12, 250,
    ),
}  # fmt: skip


@dataclass
class Case:
    tokens: torch.Tensor
    reference: torch.Tensor
    directory: str
    decoded: int
    prompt: int

    def load(self, chunk):
        length = self.tokens.shape[1]
        return load(self.directory, exact=True, max_batch=BATCH, max_seq_len=length, max_chunk=chunk)


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request, tmp_path_factory):
    config, seed, length, decoded, prompt = request.param
    directory = tmp_path_factory.mktemp("parity")
    write_random_checkpoint(directory, config, seed, torch.float32)
    judge = DeepseekV4ForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config["vocab_size"], (BATCH, length), generator=generator)
    with torch.no_grad():
        reference = judge(tokens, use_cache=False).logits
    return Case(tokens, reference, directory, decoded, prompt)


@pytest.fixture(scope="module")
def wide(case):
    """Takes the whole sequence in one chunk."""
    return case.load(case.tokens.shape[1])


@pytest.fixture(scope="module")
def narrow(case):
    return case.load(CHUNK)


def relative_error(logits, reference):
    """Largest relative L2 distance of a sequence's logits at one position."""
    return float(((logits - reference).norm(dim=-1) / reference.norm(dim=-1)).max())


def test_prompt_in_one_chunk(case, wide):
    logits = compute_logits(wide, case.tokens, case.tokens.shape[1])
    assert relative_error(logits, case.reference) < TOLERANCE


def test_prompt_in_equal_chunks(case, narrow):
    logits = compute_logits(narrow, case.tokens, case.tokens.shape[1])
    assert relative_error(logits, case.reference) < TOLERANCE


@torch.no_grad()
def test_prompt_in_chunks_of_many_sizes(case, wide):
    wide.state.reset()
    sizes, start, logits = (1, 5, 2, 13, 1, 1, 7, 31, 4, 64), 0, []
    while start < case.tokens.shape[1]:
        chunk = case.tokens[:, start : start + sizes[len(logits) % len(sizes)]]
        positions = torch.arange(start, start + chunk.shape[1], dtype=torch.int32).expand(BATCH, -1)
        logits.append(wide.logits(wide(chunk, positions)))
        start += chunk.shape[1]
    assert relative_error(torch.cat(logits, 1), case.reference) < TOLERANCE


def test_token_by_token(case, narrow):
    tokens = case.tokens[:, : case.decoded]
    assert relative_error(compute_logits(narrow, tokens, 0), case.reference[:, : case.decoded]) < TOLERANCE


def test_decode_steps_after_a_prompt(case, narrow):
    tokens = case.tokens[:, : case.prompt + 12]
    logits = compute_logits(narrow, tokens, case.prompt)
    assert relative_error(logits, case.reference[:, : case.prompt + 12]) < TOLERANCE
