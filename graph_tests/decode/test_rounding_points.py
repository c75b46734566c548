"""One attention layer and one MoE layer of a quantised checkpoint against the published rounding points, written out.

Every product of a quantised layer multiplies FP8 activations (1x128, UE8M0) or NVFP4 ones (1x16, scaled by the row),
is summed in fp32 and rounded once to bf16. Between products: norms, RoPE and attention outputs are rounded once each,
KV is FP8 in groups of 64 except for its RoPE part, probabilities stay fp32, experts are summed in fp32.
"""

import pytest
import torch

from graph_tests.decode.stored_formats import CONFIG, E2M1, stored, weight_values, write_formats
from model import load
from model.linear import quantise

BATCH, LENGTH, EPS = 2, 20, CONFIG["rms_norm_eps"]
HEADS, DIM, ROPE, GROUPS = (CONFIG[key] for key in ("num_attention_heads", "head_dim", "qk_rope_head_dim", "o_groups"))
# The products are sums in another order than the operators', and now and then such a sum lies on the other side of a
# rounding boundary, which changes its row: 1e-3 in relative L2 at the most, measured over four inputs, with more than
# half of the rows equal bit for bit. Leaving out, or adding, one rounding step below moves every row by 5e-3 or more.
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return write_formats(tmp_path_factory.mktemp("rounding"))


def bf16(x):
    return x.to(torch.bfloat16).float()


def pow2_scale(amax, largest):
    """2^ceil(log2(amax / largest)), exactly."""
    mantissa, exponent = torch.frexp(amax / largest)
    return torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())


def fp8(x, group):
    """x rounded to E4M3 in groups of `group`, as fp32."""
    parts = x.unflatten(-1, (-1, group))
    scale = pow2_scale(parts.abs().amax(-1, keepdim=True).clamp_min(1e-4), 448.0)
    return ((parts / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).flatten(-2)


def e2m1(x):
    """The nearest of E2M1, ties to the even code."""
    distance = (x.double().abs()[..., None] - E2M1).abs()
    odd = torch.tensor([0, 1] * 4) * 1e-12  # decides ties, and is far below the spacing of fp32 at 0.25
    return torch.where(x < 0, -1.0, 1.0) * E2M1[(distance + odd).argmin(-1)]


def nvfp4(x):
    """x rounded to E2M1 with E4M3 scales of 16 and a scale of the row, as fp32."""
    row = (x.abs().amax(-1, keepdim=True) / 2688).clamp_min(2.0**-126)[..., None]
    parts = x.unflatten(-1, (-1, 16))
    scale = (parts.abs().amax(-1, keepdim=True) / (6 * row)).to(torch.float8_e4m3fn).float()
    value = torch.where(scale == 0, 0.0, e2m1(parts / (scale * row)))
    return (value * scale * row).flatten(-2)


ACTIVATION = {"official": lambda x: fp8(x, 128), "fp8 with fp32 scales": lambda x: fp8(x, 128), "nvfp4": nvfp4}


class Layer:
    """The tensors of one layer, and its products in its format."""

    def __init__(self, directory, name, prefix):
        self.tensors, self.prefix, self.quantise = stored(directory), prefix, ACTIVATION[name]

    def __getitem__(self, key):
        return self.tensors[f"{self.prefix}.{key}"].float()

    def linear(self, name, x):
        weight = weight_values(self.tensors, f"{self.prefix}.{name}")
        return bf16((self.quantise(x).double() @ weight.double().T).float())


def rms_norm(x, weight):
    return bf16(x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight)


def rope(x, positions, sign=1):
    """Interleaved pairs of the last ROPE channels; x [B, S, ..., D]."""
    frequency = CONFIG["rope_theta"] ** (-torch.arange(0, ROPE, 2) / ROPE)
    angle = positions[..., None].float() * frequency * sign
    angle = angle.view(*angle.shape[:2], *[1] * (x.dim() - 3), -1)
    pairs = torch.view_as_complex(x[..., -ROPE:].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    return torch.cat((x[..., :-ROPE], turned), -1)


def attention(layer, x, positions):
    """Window attention of a prompt x [B, S, d] from position 0."""
    qr = rms_norm(layer.linear("wq_a", x), layer["q_norm.weight"])
    q = layer.linear("wq_b", qr).unflatten(-1, (HEADS, DIM))
    q = bf16(rope(q * (q.square().mean(-1, keepdim=True) + EPS).rsqrt(), positions))
    kv = bf16(rope(rms_norm(layer.linear("wkv", x), layer["kv_norm.weight"]), positions))
    kv = torch.cat((fp8(kv[..., :-ROPE], 64), kv[..., -ROPE:]), -1)
    score = torch.einsum("bshd,btd->bhst", q, kv) * DIM**-0.5
    age = positions[0][:, None] - positions[0]
    score = score.masked_fill((age < 0) | (age >= CONFIG["sliding_window"]), -torch.inf)
    sink = layer["attn_sink"].view(1, HEADS, 1, 1).expand(*score.shape[:3], 1)
    weight = torch.cat((score, sink), -1).softmax(-1)[..., :-1]
    o = bf16(rope(torch.einsum("bhst,btd->bshd", weight, kv), positions, sign=-1))
    o = o.flatten(-2).unflatten(-1, (GROUPS, -1))
    weight = weight_values(layer.tensors, f"{layer.prefix}.wo_a")
    if layer.quantise is nvfp4:
        o = nvfp4(o)
    else:  # multiplied in bf16, even where it is stored in FP8
        weight = bf16(weight)
    u = torch.einsum("bsgk,grk->bsgr", o, weight.unflatten(0, (GROUPS, -1)))
    return layer.linear("wo_b", bf16(u.flatten(-2)))


def swiglu(gate, up, route):
    limit = CONFIG["swiglu_limit"]
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return bf16(gate * torch.sigmoid(gate) * up * route)


def expert(layer, name, y, route):
    h = swiglu(layer.linear(f"{name}.w1", y), layer.linear(f"{name}.w3", y), route)
    return layer.linear(f"{name}.w2", h)


def moe(layer, y):
    """A scored layer; y [T, d]."""
    score = torch.nn.functional.softplus(y @ layer["gate.weight"].T).sqrt()
    ids = (score + layer["gate.bias"]).topk(CONFIG["num_experts_per_tok"]).indices
    weight = score.gather(1, ids)
    weight = weight / weight.sum(1, keepdim=True) * CONFIG["routed_scaling_factor"]
    total = torch.zeros_like(y)
    for slot in range(ids.shape[1]):
        for index in range(CONFIG["n_routed_experts"]):
            rows = ids[:, slot] == index
            if rows.any():
                total[rows] += expert(layer, f"experts.{index}", y[rows], weight[rows, slot, None])
    return bf16(total + expert(layer, "shared_experts", y, 1.0))


def assert_same_rounding(got, reference):
    assert got.dtype == torch.bfloat16
    error = (got.float() - reference).norm(dim=-1) / reference.norm(dim=-1)
    assert float(error.median()) == 0 and float((got.float() - reference).norm() / reference.norm()) < TOLERANCE


def random_input(seed):
    return torch.randn(BATCH, LENGTH, CONFIG["hidden_size"], generator=torch.Generator().manual_seed(seed)).bfloat16()


@torch.no_grad()
@pytest.mark.parametrize("name", ACTIVATION)
def test_window_attention_rounds_where_the_released_code_does(directories, name):
    model, x = load(directories[name], max_batch=BATCH, max_seq_len=64), random_input(14)
    positions = torch.arange(LENGTH, dtype=torch.int32).expand(BATCH, -1).contiguous()
    got = model.blocks[0].attn(x, positions, model.window_rope, model.state.layers[0])
    assert_same_rounding(got, attention(Layer(directories[name], name, "layers.0.attn"), x.float(), positions))


@torch.no_grad()
@pytest.mark.parametrize("name", ACTIVATION)
def test_moe_rounds_where_the_released_code_does(directories, name):
    model, y = load(directories[name], max_batch=BATCH, max_seq_len=64), random_input(15)
    free = torch.full((BATCH, LENGTH, CONFIG["num_experts_per_tok"]), -1, dtype=torch.int32)
    got = model.blocks[1].ffn(y, free)
    assert_same_rounding(
        got.flatten(0, 1), moe(Layer(directories[name], name, "layers.1.ffn"), y.float().flatten(0, 1))
    )


def test_activations_are_quantised_as_their_layers_want_them():
    """FP8: a UE8M0 scale for each 128 channels. NVFP4: an E4M3 scale for each 16, and an fp32 scale for each row."""
    x = random_input(22) * torch.logspace(-3, 3, CONFIG["hidden_size"]).bfloat16()
    codes, scale = quantise(x, "fp8")
    amax = x.float().unflatten(-1, (-1, 128)).abs().amax(-1)
    spread = scale.view(torch.float8_e8m0fnu).float().repeat_interleave(128, -1)
    assert torch.equal(spread[..., ::128], pow2_scale(amax, 448.0))
    assert torch.equal(codes.float() * spread, fp8(x.float(), 128))
    codes, scale, row = quantise(x, "nvfp4")
    assert torch.equal(row, x.float().abs().amax(-1, keepdim=True) / 2688)
    assert codes.shape[-1] == x.shape[-1] // 2 and scale.shape[-1] == x.shape[-1] // 16
    blocks = x.float().unflatten(-1, (-1, 16)).abs().amax(-1) / (6 * row)
    assert torch.equal(scale.float(), blocks.to(torch.float8_e4m3fn).float())
    assert quantise(x, "dense") == (x,)
