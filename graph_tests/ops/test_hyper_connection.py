"""Hyper-connections against transformers' modules and against the equations in fp64."""

import pytest
import torch
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4HyperHead

import dsv4_ops.ops.hyper_connection  # noqa: F401  registers the ops
from graph_tests import checks

STREAMS = (1, 2, 4, 16)
DIM = 24
NORM_EPS, EPS, ITERATIONS = 1e-6, 1e-6, 20
TOLERANCE = 5e-6  # fp32: dot products of up to 16 * 24 terms and their sigmoids, in another order than the judge
OPS = torch.ops.dsv4


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(n, seed=1):
    """fn, scale, base of one sub-layer."""
    rows = (2 + n) * n
    fn = random(rows, n * DIM, seed=seed) * (n * DIM) ** -0.5
    return fn, torch.tensor([0.7, 1.3, 2.0]), random(rows, seed=seed + 1)


def mixed(tokens, n, seed=5):
    """f, x, post, comb: what hc_post takes."""
    comb = random(tokens, n, n, seed=seed).softmax(-1)
    return random(tokens, DIM, seed=seed + 1), random(tokens, n, DIM, seed=seed + 2), random(tokens, n).abs(), comb


def transformers_pre(x, fn, scale, base, eps=EPS, iterations=ITERATIONS):
    """y, post, comb of transformers for x [T, n, d] fp32."""
    config = DeepseekV4Config(
        hidden_size=x.shape[-1], hc_mult=x.shape[-2], hc_eps=eps, hc_sinkhorn_iters=iterations, rms_norm_eps=NORM_EPS
    )
    module = DeepseekV4HyperConnection(config)
    with torch.no_grad():
        for parameter, value in ((module.fn, fn), (module.scale, scale), (module.base, base)):
            parameter.copy_(value)
        post, comb, y = module(x[None])
    return y[0], post[0], comb[0]


def sinkhorn_fp64(logits, eps, iterations):
    """The definition for one matrix, with Python's floats."""
    n = len(logits)
    comb = [[torch.exp(value - row.max()).item() for value in row] for row in logits.double()]
    comb = [[value / sum(row) + eps for value in row] for row in comb]
    for iteration in range(iterations):
        if iteration:
            comb = [[value / (sum(row) + eps) for value in row] for row in comb]
        sums = [sum(comb[j][k] for j in range(n)) + eps for k in range(n)]
        comb = [[comb[j][k] / sums[k] for k in range(n)] for j in range(n)]
    return torch.tensor(comb, dtype=torch.float64)


def post_fp64(f, x, post, comb):
    f, x, post, comb = (tensor.double() for tensor in (f, x, post, comb))
    return post[..., None] * f[..., None, :] + torch.einsum("...jk,...jd->...kd", comb, x)


def largest_ratio(actual, expected):
    """Largest relative difference of any element: the place of an eps shows in the smallest ones."""
    return float(((actual.double() - expected.double()).abs() / expected.double().abs()).max())


@pytest.mark.parametrize("n", STREAMS)
@pytest.mark.parametrize("spread", (1.0, 4.0))
@pytest.mark.parametrize("eps", (EPS, 0.05))
def test_sinkhorn_is_its_definition(n, spread, eps):
    """A large eps shows where it is added; only the softmax and the denominators get one."""
    logits = random(3, n, n) * spread
    comb = OPS.sinkhorn(logits, eps, ITERATIONS)
    expected = torch.stack([sinkhorn_fp64(matrix, eps, ITERATIONS) for matrix in logits])
    # an element is a product of 40 factors, each a sum of n and a division: below 40 * (n + 1) * 2^-24 even at n = 16
    assert largest_ratio(comb, expected) < 4e-5
    if eps == EPS:
        assert largest_ratio(comb.sum(-2), torch.ones(3, n)) < 1e-5, "the columns are normalised last"


@pytest.mark.parametrize("n", (2, 4, 16))
def test_sinkhorn_shows_a_missing_eps(n):
    """eps hardly moves logits end to end. Where the softmax is almost one-hot it is most of an element."""
    logits = random(3, n, n) * 0.1 + 12.0 * torch.eye(n)
    expected, without = (
        torch.stack([sinkhorn_fp64(matrix, eps, ITERATIONS) for matrix in logits]) for eps in (EPS, 0.0)
    )
    assert largest_ratio(without, expected) > 0.05
    assert largest_ratio(OPS.sinkhorn(logits, EPS, ITERATIONS), expected) < 4e-5
    assert largest_ratio(OPS.sinkhorn(logits, 0.0, ITERATIONS), without) < 4e-5


@pytest.mark.parametrize("n", (2, 4, 16))
@pytest.mark.parametrize("iterations", (1, 10, 19, 20))
def test_sinkhorn_counts_its_iterations(n, iterations):
    """An almost triangular matrix converges so slowly that one iteration more or less is seen."""
    logits = random(3, n, n) * 0.1 + 9.0 * torch.ones(n, n).tril()
    comb = OPS.sinkhorn(logits, EPS, iterations)
    for other in (1, 10, 19, 20, 21):
        expected = torch.stack([sinkhorn_fp64(matrix, EPS, other) for matrix in logits])
        assert (largest_ratio(comb, expected) < 4e-5) == (other == iterations), f"{iterations} against {other}"


@pytest.mark.parametrize("n", STREAMS)
@pytest.mark.parametrize("eps", (0.0, EPS))
@pytest.mark.parametrize("iterations", (10, 20))
def test_hc_pre_agrees_with_transformers(n, eps, iterations):
    x = random(7, n, DIM)
    actual = OPS.hc_pre(x, *weights(n), NORM_EPS, eps, iterations)
    for result, expected in zip(actual, transformers_pre(x, *weights(n), eps, iterations), strict=True):
        assert checks.relative_error(result, expected) < TOLERANCE


@pytest.mark.parametrize("n", (2, 4, 16))
def test_hc_pre_tells_settings_of_transformers_apart(n):
    """Closed gates and a one-hot, slowly converging comb: eps and iteration count decide what y and comb are."""
    x = random(7, n, DIM)
    fn, scale, base = weights(n)
    base = torch.cat((torch.full((n,), -16.0), base[n : 2 * n], (9.0 * torch.ones(n, n).tril()).flatten()))
    settings = [(eps, iterations) for eps in (0.0, EPS) for iterations in (10, 20)]
    judged = {setting: transformers_pre(x, 0.01 * fn, scale, base, *setting) for setting in settings}
    for eps, iterations in settings:
        y, _, comb = OPS.hc_pre(x, 0.01 * fn, scale, base, NORM_EPS, eps, iterations)
        for (other_eps, other_iterations), (other_y, _, other_comb) in judged.items():
            assert (checks.relative_error(y, other_y) < 1e-4) == (other_eps == eps)
            same = (other_eps, other_iterations) == (eps, iterations)
            assert (largest_ratio(comb, other_comb) < 1e-4) == same, f"{eps, iterations} {other_eps, other_iterations}"


def test_norm_eps_matters_for_small_streams():
    x = random(7, 4, DIM) * 1e-3
    y = OPS.hc_pre(x, *weights(4), NORM_EPS, EPS, ITERATIONS)[0]
    assert checks.relative_error(y, transformers_pre(x, *weights(4))[0]) < TOLERANCE
    assert checks.relative_error(OPS.hc_pre(x, *weights(4), 0.0, EPS, ITERATIONS)[0], y) > 1e-2


@pytest.mark.parametrize("n", STREAMS)
def test_hc_post_is_its_definition(n):
    arguments = mixed(7, n)
    assert checks.relative_error(OPS.hc_post(*arguments), post_fp64(*arguments)) < TOLERANCE


def test_hc_post_sums_over_the_first_index_of_comb():
    """comb[j, k] = 1 sends stream j to stream k; with integers that is exact."""
    x = torch.arange(4.0)[None, :, None].expand(1, 4, DIM).contiguous()
    comb = torch.eye(4).roll(1, dims=1)[None]  # stream j goes to j + 1
    y = OPS.hc_post(torch.ones(1, DIM), x, torch.tensor([[0.0, 10.0, 20.0, 30.0]]), comb)
    assert y[0, :, 0].tolist() == [3.0, 10.0, 21.0, 32.0]


@pytest.mark.parametrize("n", STREAMS)
def test_hc_head_agrees_with_transformers(n):
    config = DeepseekV4Config(hidden_size=DIM, hc_mult=n, hc_eps=EPS, rms_norm_eps=NORM_EPS)
    module, x = DeepseekV4HyperHead(config), random(7, n, DIM)
    fn, scale, base = weights(n)[0][:n], torch.tensor([1.7]), random(n, seed=9) - 14
    with torch.no_grad():
        for parameter, value in ((module.hc_fn, fn), (module.hc_scale, scale), (module.hc_base, base)):
            parameter.copy_(value)
        expected = module(x[None])[0]
    assert checks.relative_error(OPS.hc_head(x, fn, scale, base, NORM_EPS, EPS), expected) < TOLERANCE
    assert checks.relative_error(OPS.hc_head(x, fn, scale, base, NORM_EPS, 0.0), expected) > 1e-3


def test_bf16_streams_are_rounded_once():
    """Half a unit in the last place of bf16, at most 2^-8 of the value, and the fp32 error of the sum before it."""
    n, x = 4, random(64, 4, DIM, dtype=torch.bfloat16)
    y = OPS.hc_pre(x, *weights(n), NORM_EPS, EPS, ITERATIONS)[0].double()
    expected = transformers_pre(x.float(), *weights(n))[0].double()
    assert ((y - expected).abs() <= expected.abs() * 2**-8 * 1.001 + 1e-5).all()
    f, _, post, comb = mixed(64, n)
    y, expected = OPS.hc_post(f.bfloat16(), x, post, comb).double(), post_fp64(f.bfloat16(), x, post, comb)
    assert ((y - expected).abs() <= expected.abs() * 2**-8 * 1.001 + 1e-5).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_fused_ops_are_the_sequence_of_their_parts(dtype):
    """Across a block boundary: the streams are rounded before the next mix reads them. The judge does both in fp32."""
    n = 4
    f, x, post, comb = mixed(7, n)
    f, x, norm_weight = f.to(dtype), x.to(dtype), random(DIM, seed=11).to(dtype)
    scalars = (NORM_EPS, EPS, ITERATIONS)
    streams, y, post_next, comb_next = OPS.hc_post_pre(f, x, post, comb, *weights(n), *scalars)
    normed = OPS.hc_post_pre_rms_norm(f, x, post, comb, *weights(n), norm_weight, *scalars)
    alone = OPS.hc_pre_rms_norm(streams, *weights(n), norm_weight, *scalars)

    half_ulp = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    assert checks.relative_error(streams, post_fp64(f, x, post, comb)) < half_ulp + TOLERANCE
    expected = transformers_pre(streams.float(), *weights(n))
    for result, wanted in zip((y, post_next, comb_next), expected, strict=True):
        assert checks.relative_error(result, wanted) < half_ulp + TOLERANCE
    y64 = y.double()
    y64 = y64 * (y64.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt() * norm_weight.double()
    assert checks.relative_error(normed[1], y64) < half_ulp + TOLERANCE
    for result, wanted in zip(normed, (streams, *alone), strict=True):
        checks.assert_bits_equal(result, wanted)
    for result, wanted in zip(normed[2:], (post_next, comb_next), strict=True):
        checks.assert_bits_equal(result, wanted)


def arguments_of(name, rows, n, dtype=torch.float32, layout=lambda tensor: tensor):
    """Arguments of any op of the family for leading dimensions `rows`."""
    tokens = torch.Size(rows).numel()
    f, x, post, comb = (tensor.unflatten(0, rows) if len(rows) != 1 else tensor for tensor in mixed(tokens, n))
    post_arguments = (layout(f.to(dtype)), layout(x.to(dtype)), layout(post), layout(comb))
    pre_weights, scalars = weights(n), (NORM_EPS, EPS, ITERATIONS)
    norm_weight = random(DIM, seed=11)
    return {
        "sinkhorn": (layout(random(*rows, n, n)), EPS, ITERATIONS),
        "hc_pre": (post_arguments[1], *pre_weights, *scalars),
        "hc_pre_rms_norm": (post_arguments[1], *pre_weights, norm_weight, *scalars),
        "hc_post": post_arguments,
        "hc_post_pre": (*post_arguments, *pre_weights, *scalars),
        "hc_post_pre_rms_norm": (*post_arguments, *pre_weights, norm_weight, *scalars),
        "hc_head": (post_arguments[1], pre_weights[0][:n], torch.tensor([1.5]), random(n), NORM_EPS, EPS),
    }[name]


NAMES = ("sinkhorn", "hc_pre", "hc_pre_rms_norm", "hc_post", "hc_post_pre", "hc_post_pre_rms_norm", "hc_head")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", ((0,), (1,), (2,), (7,), (64,), (2, 3), (0, 3), (3, 0)), ids=str)
def test_op_contract(name, rows):
    for n in STREAMS:
        for dtype in (torch.float32, torch.bfloat16):
            for layout in (lambda tensor: tensor, checks.row_strided):
                checks.check_op(name, arguments_of(name, rows, n, dtype, layout))


@pytest.mark.parametrize("name", NAMES)
def test_fake_does_not_specialise_on_the_batch(name):
    checks.check_symbolic_batch(name, lambda batch: arguments_of(name, (batch, 3), 4))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    checks.opcheck(name, arguments_of(name, (3,), 4))


@pytest.mark.parametrize("name", NAMES)
def test_row_strided_streams_give_the_same_bits(name):
    plain = getattr(OPS, name)(*arguments_of(name, (7,), 4))
    strided = getattr(OPS, name)(*arguments_of(name, (7,), 4, layout=checks.row_strided))
    for left, right in zip(
        torch.utils._pytree.tree_leaves(plain), torch.utils._pytree.tree_leaves(strided), strict=True
    ):
        checks.assert_bits_equal(left, right)


@pytest.mark.parametrize(
    ("name", "index", "wrong", "message"),
    (
        ("sinkhorn", 0, torch.zeros(2, 3, 4), "logits must be"),
        ("sinkhorn", 2, 0, "iterations must be at least 1"),
        ("hc_pre", 0, torch.zeros(2, 17, DIM), "n <= 16"),
        ("hc_pre", 0, torch.zeros(2, 4, DIM, dtype=torch.float16), "bfloat16 or float32"),
        ("hc_pre", 1, torch.zeros(24, 4 * DIM + 1), "fn must be"),
        ("hc_pre", 2, torch.zeros(1), "scale must be"),
        ("hc_post", 0, torch.zeros(2, DIM, dtype=torch.bfloat16), "f must be"),
        ("hc_post", 2, torch.zeros(2, 3), "post must be"),
        ("hc_post_pre", 6, torch.zeros(23), "base must be"),
        ("hc_pre_rms_norm", 4, torch.zeros(DIM + 1), "norm_weight must be"),
        ("hc_head", 1, torch.zeros(24, 4 * DIM), "fn must be"),
    ),
)
def test_wrong_arguments_are_refused_by_name(name, index, wrong, message):
    arguments = list(arguments_of(name, (2,), 4))
    arguments[index] = wrong
    with pytest.raises(ValueError, match=rf"dsv4::{name}: .*{message}"):
        getattr(OPS, name)(*arguments)
