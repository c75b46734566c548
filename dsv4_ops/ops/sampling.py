"""Sampling the next token on the device: greedy, temperature, top-k, top-p.

Random numbers are a pure function of (seed, counter, token), from Philox-4x32-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", 2011): the key is the seed, the counter block is (counter, token // 4), and token v uses
word v % 4 of it. Adding Gumbel noise to the logits and taking the largest draws from the softmax (Gumbel-max), with no
sum over the vocabulary. A sequence's token does not depend on its batch or its place in it; the caller counts up
`counter` for every token of a sequence.
"""

import torch
from torch import Tensor

from dsv4_ops.registry import define, describe, expect

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
PHILOX_ROUNDS = 10
WORD = 0xFFFFFFFF  # words are held in int64, which wraps like the 64-bit product does


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10 of four counter words and two key words (int64 tensors of values below 2^32) -> four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        first, second = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (second >> 32 & WORD) ^ c1 ^ k0, second & WORD, (first >> 32 & WORD) ^ c3 ^ k1, first & WORD
        k0, k1 = k0 + PHILOX_KEY_STEPS[0] & WORD, k1 + PHILOX_KEY_STEPS[1] & WORD
    return c0, c1, c2, c3


def gumbel_noise(seed: Tensor, counter: Tensor, size: int) -> Tensor:
    """Gumbel noise [B, size] f32 of seed, counter [B] int64: -log(-log1p(-u)), u = (word + 1/2) / 2^32 below 1.

    The logarithm of 1 - u, not of u, because the large values of the noise, which decide, come from small u, where
    fp32 is fine-grained.
    """
    block = torch.arange(-(-size // 4), device=seed.device)
    low, high = (counter & WORD)[:, None], (counter >> 32 & WORD)[:, None]
    key = (seed & WORD)[:, None], (seed >> 32 & WORD)[:, None]
    words = philox((low, high, block[None], torch.zeros_like(block)[None]), key)
    uniform = (torch.stack(words, -1).flatten(1)[:, :size].float() + 0.5) * 2.0**-32
    return -(-(-uniform.clamp_max(1 - 2.0**-24)).log1p()).log()


def noisy_by_rank(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, counter: Tensor
) -> tuple[Tensor, Tensor]:
    """Scaled logits with noise, -inf where a token is dropped, and the tokens [B, V], both largest logit first."""
    shifted = logits - logits.amax(-1, keepdim=True)  # before the division, which could overflow
    scaled = shifted / torch.where(temperature > 0, temperature, 1.0)[:, None]
    value, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    value = torch.where((top_k[:, None] <= 0) | (rank < top_k[:, None]), value, -torch.inf)
    probability = value.softmax(-1).double()
    before = probability.cumsum(-1) - probability
    kept = (rank == 0) | (top_p[:, None] >= 1) | (before < top_p[:, None])
    noise = gumbel_noise(seed, counter, logits.shape[1]).gather(1, order)
    return torch.where(kept, value + noise, -torch.inf), order


def sample_reference(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, counter: Tensor
) -> Tensor:
    """Greedy where temperature is 0, else a draw from the tokens that top-k and then top-p keep; ties: lowest index.

    top-p keeps the fewest tokens, most probable first, whose probability among those of top-k reaches top_p; at least
    one.
    """
    noisy, order = noisy_by_rank(logits, temperature, top_k, top_p, seed, counter)
    drawn = order.gather(1, noisy.argmax(-1, keepdim=True))[:, 0]
    return torch.where(temperature > 0, drawn, order[:, 0])


def check_sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, counter: Tensor
) -> None:
    fits = logits.dim() == 2 and logits.dtype == torch.float32 and logits.shape[1] > 0
    expect(fits, "sample", f"logits must be [B, V] float32, got {describe(logits)}")
    float32, int32, int64 = torch.float32, torch.int32, torch.int64
    wanted = {"temperature": float32, "top_k": int32, "top_p": float32, "seed": int64, "counter": int64}
    for (name, dtype), tensor in zip(wanted.items(), (temperature, top_k, top_p, seed, counter), strict=True):
        fits = tensor.dim() == 1 and tensor.dtype == dtype
        expect(fits, "sample", f"{name} must be [B] {str(dtype).removeprefix('torch.')}, got {describe(tensor)}")


def sample_workspace(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, counter: Tensor
) -> Tensor:
    """Histogram, list, and what chunks of the vocabulary found, [B, words] int64: see csrc/sampling/sample.h."""
    rows, vocabulary = logits.shape
    chunks = -(-vocabulary // 2048) * 2
    return logits.new_empty((rows, 2048 + 4096 + 2 + 5 * chunks), dtype=torch.int64)


# logits [B, V] f32, temperature [B] f32 (0: greedy), top_k [B] int32 (0: off), top_p [B] f32 (1: off),
# seed [B] int64, counter [B] int64 -> token [B] int64
sample = define(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor seed, Tensor counter) "
    "-> (Tensor token)",
    alloc=lambda logits, temperature, top_k, top_p, seed, counter: seed.new_empty(seed.shape),
    reference=sample_reference,
    check=check_sample,
    workspace=sample_workspace,
)
