"""Sampling against published Philox vectors, a sampler in Python integers and floats, and the distribution itself."""

import math

import pytest
import torch

from dsv4_ops.ops.sampling import gumbel_noise, philox
from graph_tests import checks

OPS = torch.ops.dsv4

# Random123 (Salmon et al. 2011), file kat_vectors, philox4x32 with 10 rounds: counter, key, result
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
CHI_SQUARE_LIMIT = {2: 18.4, 3: 21.1, 9: 33.7}  # exceeded with probability 1e-4, by degrees of freedom


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def python_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 in Python integers, as the paper writes it: multiply, swap, xor, bump the key."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ k, q % 2**32, (p >> 32) ^ d ^ m, p % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def python_gumbel(seed: int, counter: int, token: int) -> float:
    seed, counter = seed % 2**64, counter % 2**64
    block = python_philox([counter % 2**32, counter >> 32, token // 4, 0], [seed % 2**32, seed >> 32])
    return -math.log(-math.log1p(-min((block[token % 4] + 0.5) / 2**32, 1 - 2**-24)))


def python_sample(
    logits: list[float], temperature: float, top_k: int, top_p: float, seed: int, counter: int
) -> tuple[int, float]:
    """The token, and by how much it won (0: decided by a tie)."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if temperature == 0:
        return order[0], math.inf
    kept = order[:top_k] if top_k > 0 else order
    mass = [math.exp((logits[token] - logits[order[0]]) / temperature) for token in kept]
    nucleus, reached = [], 0.0
    for token, part in zip(kept, mass, strict=True):
        if nucleus and top_p < 1 and reached >= top_p:
            break
        nucleus.append(token)
        reached += part / sum(mass)
    noisy = sorted(((logits[t] / temperature + python_gumbel(seed, counter, t), t) for t in nucleus), reverse=True)
    return noisy[0][1], noisy[0][0] - noisy[1][0] if len(noisy) > 1 else math.inf


def arguments(logits, temperature=1.0, top_k=0, top_p=1.0, seed=7, counter=0) -> tuple:
    """Arguments of the op: each setting one number for the batch, or a list."""
    logits = torch.as_tensor(logits, dtype=torch.float32)
    dtypes = (torch.float32, torch.int32, torch.float32, torch.int64, torch.int64)
    settings = zip((temperature, top_k, top_p, seed, counter), dtypes, strict=True)
    return (
        logits,
        *(torch.as_tensor(value, dtype=dtype).expand(len(logits)).contiguous() for value, dtype in settings),
    )


def draw(probabilities: list[float], count: int, **settings) -> list[int]:
    """How often each token comes out in `count` draws with counters 0 .. count - 1."""
    logits = torch.tensor(probabilities).log().expand(count, -1)
    settings.setdefault("counter", list(range(count)))
    token = OPS.sample(*arguments(logits, **settings))
    return torch.bincount(token, minlength=len(probabilities)).tolist()


def chi_square(counts: list[int], probabilities: list[float]) -> float:
    total = sum(counts)
    return sum((n - total * p) ** 2 / (total * p) for n, p in zip(counts, probabilities, strict=True))


def test_philox_known_answers():
    for counter, key, expected in KNOWN_ANSWERS:
        counter, key = (tuple(torch.tensor([word]) for word in words(text)) for text in (counter, key))
        assert [int(word) for word in philox(counter, key)] == words(expected)


def test_judge_philox_known_answers():
    for counter, key, expected in KNOWN_ANSWERS:
        assert python_philox(words(counter), words(key)) == words(expected)


@pytest.mark.parametrize("vocabulary", [1, 2, 5, 12, 131])
def test_equals_a_sampler_in_python(vocabulary):
    """Rows that fp32 could decide otherwise (won by less than 1e-4) do not occur for these seeds."""
    rows, generator = 60, torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=generator) * 2
    temperature = [(0.0, 0.3, 1.0, 2.5)[row % 4] for row in range(rows)]
    top_k = [(0, 1, 3, vocabulary, vocabulary + 5)[row % 5] for row in range(rows)]
    top_p = [(1.0, 0.9, 0.5, 1e-6)[row // 4 % 4] for row in range(rows)]
    seed = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    counter = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    counter[: rows // 2] = torch.arange(rows // 2)
    columns = (temperature, top_k, top_p, seed.tolist(), counter.tolist())
    expected = [python_sample(*row) for row in zip(logits.tolist(), *columns, strict=True)]
    assert min(margin for _, margin in expected) > 1e-4
    assert OPS.sample(*arguments(logits, *columns)).tolist() == [token for token, _ in expected]


def test_noise_is_finite_where_the_word_rounds_up_to_one():
    """Seed 0, counter 44, token 72918 is the word fffffff6, which is 2^32 in fp32: log1p(-1) would be infinite."""
    noise = gumbel_noise(torch.tensor([0]), torch.tensor([44]), 72920)[0]
    assert noise.isfinite().all()
    tokens = [0, 1, 2, 3, 4, 777, 72917, 72918, 72919]
    expected = torch.tensor([python_gumbel(0, 44, token) for token in tokens])
    # u is off by 2^-24 of itself, log1p(-u) by that over 1 - u, which is above 1e-3 for these tokens
    unrounded = [i for i, token in enumerate(tokens) if token != 72918]
    torch.testing.assert_close(noise[tokens][unrounded], expected[unrounded], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(noise[72918], torch.tensor(-math.log(24 * math.log(2))), rtol=1e-6, atol=0)


def test_draws_follow_the_softmax():
    probabilities = [0.3, 0.2, 0.15, 0.1, 0.08, 0.07, 0.05, 0.03, 0.015, 0.005]
    assert chi_square(draw(probabilities, 20000), probabilities) < CHI_SQUARE_LIMIT[9]


def test_draws_of_different_seeds_follow_the_softmax():
    probabilities = [0.3, 0.2, 0.15, 0.1, 0.08, 0.07, 0.05, 0.03, 0.015, 0.005]
    counts = draw(probabilities, 20000, seed=list(range(20000)), counter=3)
    assert chi_square(counts, probabilities) < CHI_SQUARE_LIMIT[9]


def test_temperature_sharpens_the_softmax():
    """Temperature 1/2 squares the probabilities."""
    squares = [0.4**2, 0.3**2, 0.2**2, 0.1**2]
    counts = draw([0.4, 0.3, 0.2, 0.1], 10000, temperature=0.5)
    assert chi_square(counts, [square / sum(squares) for square in squares]) < CHI_SQUARE_LIMIT[3]


def test_top_k_and_top_p_draw_from_the_kept_tokens():
    """top-k keeps .3 .3 .2 .1 of five; of those, 8/9 is reached with .3 .3 .2, so that top-p 0.85 keeps three."""
    counts = draw([0.1, 0.3, 0.1, 0.3, 0.2], 9000, top_k=4, top_p=0.85)
    assert counts[0] == counts[2] == 0
    assert chi_square([counts[1], counts[3], counts[4]], [3 / 8, 3 / 8, 2 / 8]) < CHI_SQUARE_LIMIT[2]


def test_top_k_breaks_ties_by_the_lowest_index():
    counts = draw([0.1] * 10, 2000, top_k=3)
    assert all(counts[:3]) and not any(counts[3:])


def test_top_p_breaks_ties_by_the_lowest_index():
    """Four tokens of 1/4 (exact in fp32): 0.5 is reached with two of them, anything above needs a third."""
    counts = draw([0.25] * 4, 2000, top_p=0.5)
    assert all(counts[:2]) and not any(counts[2:])
    counts = draw([0.25] * 4, 2000, top_p=0.5001)
    assert all(counts[:3]) and not counts[3]


@pytest.mark.parametrize("top_p", [0.0, 1e-30, 0.3])
def test_tiny_top_p_keeps_the_best_token(top_p):
    assert draw([0.2, 0.45, 0.35], 500, top_p=top_p) == [0, 500, 0]


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-38}])
def test_greedy_takes_the_largest_logit(settings):
    """Also at a temperature at which the quotients overflow fp32."""
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(1)) * 10
    assert OPS.sample(*arguments(logits, **settings)).tolist() == [
        max(range(50), key=row.__getitem__) for row in logits
    ]


def test_greedy_ties_go_to_the_lowest_index():
    logits = [[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-0.0, 0.0, -1.0, 0.0], [-torch.inf, 5.0, -torch.inf, 5.0]]
    assert OPS.sample(*arguments(logits, temperature=0.0, top_p=0.1)).tolist() == [1, 0, 0, 1]


def test_greedy_and_sampled_rows_share_a_batch():
    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(2))
    mixed = OPS.sample(*arguments(logits, temperature=[0.0, 1.0] * 3))
    assert mixed[::2].tolist() == OPS.sample(*arguments(logits, temperature=0.0))[::2].tolist()
    assert mixed[1::2].tolist() == OPS.sample(*arguments(logits))[1::2].tolist()


def test_masked_tokens_are_never_drawn():
    assert draw([0.0, 0.5, 0.0, 0.5], 1000)[::2] == [0, 0]


def test_token_does_not_depend_on_the_place_in_the_batch():
    logits = torch.randn(1, 77, generator=torch.Generator().manual_seed(3)).expand(5, -1)
    others = torch.randn(9, 77, generator=torch.Generator().manual_seed(4))
    counter = [3, 1, 4, 1, 5]
    alone = [int(OPS.sample(*arguments(logits[:1], seed=11, counter=c))) for c in counter]
    assert OPS.sample(*arguments(logits, seed=11, counter=counter)).tolist() == alone
    mixed = torch.cat((others, logits))
    assert OPS.sample(*arguments(mixed, seed=11, counter=[0] * 9 + counter))[9:].tolist() == alone


def test_seed_and_counter_change_the_draw():
    logits = torch.zeros(200, 1000)
    by_counter = OPS.sample(*arguments(logits, counter=list(range(200))))
    by_seed = OPS.sample(*arguments(logits, seed=list(range(200))))
    by_high_words = OPS.sample(*arguments(logits, counter=[i << 32 for i in range(200)]))
    for tokens in (by_counter, by_seed, by_high_words):
        assert len(tokens.unique()) > 150  # 200 draws of 1000: 181 distinct ones are expected


def contract_arguments(batch: int) -> tuple:
    logits = torch.randn(batch, 37, generator=torch.Generator().manual_seed(5))
    return arguments(logits, temperature=0.7, top_k=20, top_p=0.9)


@pytest.mark.parametrize("batch", [0, 1, 2, 7, 64])
def test_contract(batch):
    logits, *settings = contract_arguments(batch)
    checks.check_op("sample", (logits, *settings))
    strided = checks.row_strided(logits)
    checks.check_op("sample", (strided, *settings))
    assert torch.equal(OPS.sample(strided, *settings), OPS.sample(logits, *settings))


def test_no_guard_on_the_batch():
    checks.check_symbolic_batch("sample", contract_arguments)
    checks.opcheck("sample", contract_arguments(3))


def test_wrong_arguments_are_named():
    logits, *settings = contract_arguments(2)
    with pytest.raises(ValueError, match="logits must be \\[B, V\\] float32"):
        OPS.sample(logits.bfloat16(), *settings)
    with pytest.raises(ValueError, match="top_k must be \\[B\\] int32"):
        OPS.sample(logits, settings[0], settings[1].long(), *settings[2:])
