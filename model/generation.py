"""Generation: prompts in chunks, then decode steps whose tokens the host reads one step late."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.decoding import Decoder, make_decoder
from model.errors import UserError
from model.transformer import DeepseekV4


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 are off. Sequence i draws from seed + i."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        limits = (
            (0 <= self.temperature < math.inf, "temperature must be >= 0", self.temperature),
            (0 <= self.top_k < 2**31, "top_k must be 0 (off) or a number of tokens", self.top_k),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1", self.top_p),
            (abs(self.seed) < 2**62, "seed must fit into 62 bits", self.seed),
        )
        for holds, wanted, got in limits:
            if not holds:
                raise UserError(f"{wanted}, got {got}")


@torch.no_grad()
def generate(
    model: DeepseekV4,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    decoder: Decoder | None = None,
) -> Iterator[tuple[int, int]]:
    """Yield (sequence, token) in the order in which tokens become known; end-of-sentence tokens are not yielded.

    decoder: made by `make_decoder(model)` before, to be used for several calls (default: one is made here).
    Raises UserError if a prompt is empty, has a token out of range, or does not fit into the state.
    """
    state = model.state
    batch = state.sizes.max_batch
    check_prompts(prompts, max_new_tokens, model.config.vocab_size, batch, state.sizes.max_seq_len)
    state.reset()
    state.temperature.fill_(sampling.temperature)
    state.top_k.fill_(sampling.top_k)
    state.top_p.fill_(sampling.top_p)
    state.seed.copy_(torch.arange(sampling.seed, sampling.seed + batch))

    decoder = make_decoder(model) if decoder is None else decoder
    decoder.start(0)
    logits = prefill(model, prompts)
    state.active.copy_(torch.arange(batch) < len(prompts))
    model.sample_next(logits, state.active.clone())
    decoder.publish()

    eos = set(model.config.eos_token_ids)
    running = set(range(len(prompts)))
    for step in range(max_new_tokens):
        if step + 1 < max_new_tokens:
            decoder.step(max(running) + 1)
        tokens = decoder.tokens(step)
        for sequence in sorted(running):
            if tokens[sequence] in eos:
                running.discard(sequence)
            else:
                yield sequence, tokens[sequence]
        if not running:
            return


def prefill(model: DeepseekV4, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Read the prompts from the sequences' positions on, chunk by chunk; logits [B, vocab] of each one's last token."""
    state, sizes = model.state, model.state.sizes
    device = state.token.device
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(sizes.max_batch, longest, dtype=torch.int64)
    lengths = torch.zeros(sizes.max_batch, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
        lengths[row] = len(prompt)
    logits = torch.zeros(sizes.max_batch, model.config.vocab_size, device=device)
    for start in range(0, longest, sizes.max_chunk):
        rows = (lengths - start).clamp(0, sizes.max_chunk).to(device)
        chunk = model.prefill(tokens[:, start : start + sizes.max_chunk].to(device), rows)
        logits = torch.where((rows > 0)[:, None], chunk, logits)
    return logits


def check_prompts(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, vocab: int, max_batch: int, max_seq_len: int
) -> None:
    """Everything that could go wrong later is found here, before anything is loaded or computed."""
    if not prompts:
        raise UserError("no prompt was given; use --prompt TEXT or --prompt-ids IDS")
    if len(prompts) > max_batch:
        raise UserError(f"{len(prompts)} prompts do not fit into a state of {max_batch} sequences; raise --batch")
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index} has no token")
        wrong = next((token for token in prompt if not 0 <= token < vocab), None)
        if wrong is not None:
            raise UserError(f"prompt {index}: token {wrong} is out of range, the vocabulary has {vocab} tokens")
        needed = len(prompt) + max_new_tokens
        if needed > max_seq_len:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens and with {max_new_tokens} new ones needs {needed} positions, "
                f"the state has {max_seq_len}; raise --max-seq-len or ask for fewer tokens"
            )
