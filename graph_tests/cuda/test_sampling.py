"""The kernels of `sample` against the reference: the same token."""

from itertools import product

import pytest
import torch

from dsv4_ops.ops.sampling import noisy_by_rank
from graph_tests.checks import row_strided
from graph_tests.cuda.kernel_checks import assert_rows_independent, check_kernel, on_cuda
from graph_tests.ops.test_sampling import arguments

pytestmark = pytest.mark.cuda

OPS = torch.ops.dsv4
VOCABULARY = 129280
SMALL = (1, 2, 5, 37, 100, 131, 1025, 3000)
KINDS = ("normal", "ties", "equal", "masked", "huge")
TEMPERATURES = (0.0, 0.01, 0.3, 1.0, 2.5, 5.0, 1e-38)
TOP_PS = (1.0, 0.9, 0.5, 0.1, 1e-6, 0.0, 0.99, 2.0)
NAN, INF = float("nan"), float("inf")


def make_logits(rows: int, vocabulary: int, kind: str = "normal", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator) * 2
    masked = torch.rand(rows, vocabulary, generator=generator) < 0.9
    return {
        "normal": logits,
        "ties": (logits * 2).round() / 2,
        "equal": torch.zeros_like(logits),
        "masked": torch.where(masked, -torch.inf, logits),
        "huge": logits * 1e30,
    }[kind]


def mixed(rows: int, vocabulary: int, kind: str = "normal", seed: int = 0) -> tuple:
    """Every row has settings of its own."""
    generator = torch.Generator().manual_seed(seed)

    def pick(choices: tuple) -> list:
        return [choices[i] for i in torch.randint(len(choices), (rows,), generator=generator).tolist()]

    def integers() -> torch.Tensor:
        return torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)

    top_k = pick((0, 0, 1, 2, 3, 50, vocabulary - 1, vocabulary, vocabulary + 5, -1))
    settings = (pick(TEMPERATURES), top_k, pick(TOP_PS), integers(), integers())
    return arguments(make_logits(rows, vocabulary, kind, seed), *settings)


def check(sample_arguments: tuple) -> None:
    """The reference's token. Only where its two best noisy values are closer than the noise of CPU and GPU (6e-6: see
    sample.cu) may it be another one: for these seeds in no row that is known of."""
    noisy, _ = noisy_by_rank(*sample_arguments)
    best = noisy.topk(min(2, noisy.shape[1])).values
    undecided = (best[:, 0] - best[:, -1] < 1e-5) & (sample_arguments[1] > 0) & (noisy.shape[1] > 1)

    def same_token(actual: torch.Tensor, expected: torch.Tensor) -> None:
        wrong = ((actual != expected) & ~undecided).nonzero()[:, 0]
        assert not len(wrong), f"rows {wrong[:8].tolist()}: {actual[wrong][:8]} instead of {expected[wrong][:8]}"

    check_kernel("sample", sample_arguments, same_token)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocabulary", SMALL)
def test_small_vocabularies(vocabulary, kind):
    check(mixed(60 if vocabulary < 1000 else 24, vocabulary, kind, seed=vocabulary))


@pytest.mark.parametrize("rows", [0, 1, 3, 130])
def test_batches(rows):
    check(mixed(rows, 1030, seed=rows))


@pytest.mark.sanitize
@pytest.mark.parametrize("kind", ["normal", "equal"])
def test_a_few_chunks(kind):
    check(mixed(6, 5000, kind, seed=3))


@pytest.mark.parametrize("kind", ["normal", "ties", "masked"])
def test_the_vocabulary_of_the_model(kind):
    check(mixed(16, VOCABULARY, kind, seed=1))


@pytest.mark.parametrize("rows", [1, 3])
def test_one_sequence(rows):
    """Chunks of one step, of which a thread has the logits before it knows its row's settings."""
    logits = make_logits(rows, VOCABULARY, seed=2)
    for temperature, top_k, top_p in ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 50, 1.0), (1.0, 0, 0.95), (1.2, 1000, 0.9)):
        check(arguments(logits, temperature, top_k, top_p, seed=5, counter=list(range(rows))))


def test_grid_of_settings():
    settings = list(product((0.01, 0.7, 1.0, 5.0), (0, 1, 50, VOCABULARY), (0.1, 0.9, 1e-6, 1.0)))
    temperature, top_k, top_p = (list(column) for column in zip(*settings, strict=True))
    logits = make_logits(len(settings), VOCABULARY, seed=4) * 2
    check(arguments(logits, temperature, top_k, top_p, seed=9, counter=list(range(len(settings)))))


def test_cuts_in_the_bulk():
    """Thousands of tokens share the bucket in which top-k or top-p cuts."""
    logits = make_logits(12, VOCABULARY, seed=5)
    top_k, top_p = [0, 40000, 0, 40000] * 3, [0.9, 0.7, 0.999, 1.0] * 3
    check(arguments(logits, [0.8, 1.0, 20.0] * 4, top_k, top_p, seed=1, counter=list(range(12))))


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3])
def test_more_tokens_in_a_bucket_than_the_list_holds(spread):
    """Nearly equal logits of 9000 tokens: the last kernel reads the row."""
    logits = make_logits(16, 9000, seed=6) * spread
    top_k, top_p = [0, 50, 8000, 1000] * 4, [0.9, 1.0, 0.5, 0.3] * 4
    check(arguments(logits, 1.0, top_k, top_p, seed=2, counter=list(range(16))))


def test_greedy_takes_the_first_of_the_largest():
    logits = torch.zeros(5, 4000)
    logits[0, [3999, 17, 2048]] = 3.0
    logits[1] = -INF
    logits[2, 1:] = -0.0  # as large as 0
    logits[3, :-1] = -1e30
    logits[4, [5, 3000]] = 3e38
    check(arguments(logits, 0.0))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_finite(temperature, top_p):
    """A NaN makes all differences from the largest logit NaN; an infinity those of the infinities."""
    logits = make_logits(8, 1500, seed=7)
    logits[0, 700], logits[1, 5], logits[1, 1400] = NAN, -NAN, INF
    logits[2, [7, 1300]] = INF
    logits[3], logits[4] = -INF, NAN
    logits[5] = -INF
    logits[5, 1234] = -1e30
    logits[6, 0] = -INF
    check(arguments(logits, temperature, 0, top_p))


@pytest.mark.parametrize("kind", ["normal", "masked"])
def test_settings_that_are_not_finite(kind):
    """NaN and negative temperatures are greedy, an infinite one makes all tokens equal, and -inf NaN."""
    rows = 24
    temperature = [NAN, -1.0, INF, 1.0, INF, -INF] * 4
    top_p = [1.0] * 6 + [NAN] * 6 + [0.9] * 6 + [-1.0] * 6
    logits = make_logits(rows, 300, kind, seed=8)
    check(arguments(logits, temperature, [0, 5] * 12, top_p, counter=list(range(rows))))


@pytest.mark.parametrize("vocabulary", [37, 5000])
def test_settings_at_the_ends_of_their_types(vocabulary):
    rows = 32
    top_k = [-5, 2**31 - 1, -(2**31), 3] * 8
    top_p = [NAN, -1.0, INF, -INF, 0.0, 0.5, 2.0, 1e-45] * 4
    temperature = [NAN, INF, -INF, -1.0, 1e-45, 3e38, 1.0, 0.5] * 4
    settings = (temperature, top_k, top_p[1:] + top_p[:1], [2**63 - 1, -(2**63)] * 16, list(range(rows)))
    check(arguments(make_logits(rows, vocabulary, seed=11), *settings))


@pytest.mark.sanitize
@pytest.mark.parametrize("seed", range(2))
def test_random_bits_give_a_token_of_the_vocabulary(seed):
    """Whatever logits and settings hold. Also where they change between the launches of a call, as they do while
    another stream writes them: that ended in a write far behind the list of a row, whose length nobody had cleared."""
    rows, vocabulary = 16, 20000
    generator = torch.Generator("cuda").manual_seed(seed)

    def random_bits(*shape: int, words: int = 1) -> torch.Tensor:
        low, high = -(2**31), 2**31
        bits = torch.randint(low, high, (*shape, words), generator=generator, device="cuda").int()
        return bits.view(torch.int64 if words == 2 else torch.float32).squeeze(-1)

    def batch() -> tuple:
        settings = random_bits(rows), random_bits(rows).view(torch.int32), random_bits(rows)
        return random_bits(rows, vocabulary), *settings, random_bits(rows, words=2), random_bits(rows, words=2)

    def drawn() -> tuple:
        return on_cuda(mixed(rows, vocabulary, seed=seed))

    tokens = [OPS.sample(*batch())]
    static, sources = drawn(), [batch(), drawn(), batch()] * 4
    torch.cuda.synchronize()
    writer = torch.cuda.Stream()
    with torch.cuda.stream(writer):
        for source in sources:
            for destination, values in zip(static, source, strict=True):
                destination.copy_(values)
    for _ in range(20):
        tokens.append(OPS.sample(*static))
    torch.cuda.current_stream().wait_stream(writer)
    for token in tokens:
        assert 0 <= int(token.min()) and int(token.max()) < vocabulary


def test_noise_of_the_words_at_both_ends():
    """Seed 0, counter 44: the word of token 72918 rounds up to 2^32. Drawn with every other token masked."""
    logits = torch.full((1, 72920), -INF)
    logits[0, 72918] = 0.0
    check(arguments(logits, seed=0, counter=44))
    check(arguments(torch.zeros(1, 72920), seed=0, counter=44))


@pytest.mark.parametrize("vocabulary", [37, 1028, 1029])
def test_rows_may_start_anywhere(vocabulary):
    logits, *settings = mixed(10, vocabulary, seed=9)
    for padding in (3, 16):
        check((row_strided(logits, padding), *settings))
    shifted = torch.zeros(10 * vocabulary + 1)[1:].view(10, vocabulary).copy_(logits)
    check((shifted, *settings))


def test_rows_do_not_depend_on_the_batch():
    """128 rows have chunks of 8192 tokens, one row of 1024."""
    batch = mixed(128, VOCABULARY, seed=10)
    assert_rows_independent("sample", batch, batched=tuple(range(6)), rows=tuple(range(0, 128, 9)))


def test_a_graph_follows_its_settings():
    """A captured call replayed with other logits, settings and counters: greedy, filtered and not."""
    batches = [on_cuda(mixed(8, 20000, kind, seed=seed)) for seed, kind in enumerate(("normal", "ties", "masked"))]
    static = tuple(tensor.clone() for tensor in batches[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        OPS.sample(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token = OPS.sample(*static)
    for batch in [*batches, batches[0]]:
        for destination, source in zip(static, batch, strict=True):
            destination.copy_(source)
        graph.replay()
        assert torch.equal(token, OPS.sample(*batch))


def test_wrong_arguments_are_named():
    logits, *settings = on_cuda(mixed(3, 40))
    token = torch.empty(3, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match=r"dsv4::sample: workspace must be given, \[B, 6156\] int64"):
        OPS.sample.out(logits, *settings, token=token)
    workspace = torch.empty(3, 6156, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match=r"dsv4::sample: workspace must be \[3, 6156\] int64"):
        OPS.sample.out(logits, *settings, token=token, workspace=workspace[:2])
    with pytest.raises(RuntimeError, match=r"dsv4::sample: top_k must be \[3\] int32"):
        OPS.sample.out(logits, settings[0], settings[1].long(), *settings[2:], token=token, workspace=workspace)
    with pytest.raises(RuntimeError, match=r"dsv4::sample: seed must be \[3\] int64"):
        OPS.sample.out(logits, *settings[:3], settings[3][:2], settings[4], token=token, workspace=workspace)
    with pytest.raises(RuntimeError, match=r"dsv4::sample: temperature must be on cuda:0"):
        OPS.sample.out(logits, settings[0].cpu(), *settings[1:], token=token, workspace=workspace)
    with pytest.raises(RuntimeError, match=r"dsv4::sample: token must be \[3\] int64"):
        OPS.sample.out(logits, *settings, token=token.int(), workspace=workspace)
    with pytest.raises(RuntimeError, match=r"dsv4::sample: logits must be \[B, V\] with 1 <= V <= 1048576"):
        OPS.sample(torch.zeros(3, 2**20 + 1, device="cuda"), *settings)
