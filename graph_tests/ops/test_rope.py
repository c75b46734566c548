"""Rotary tables and rotation against transformers' DeepseekV4RotaryEmbedding and apply_rotary_pos_emb."""

import pytest
import torch
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding, apply_rotary_pos_emb

from dsv4_ops.ops.rope import apply_rope, rope_table
from graph_tests.checks import assert_bits_equal

YARN = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}
FEW = torch.tensor([0, 1, 2, 127, 128, 4095, 4096, 65535])


def judge(rope_type: str, positions: torch.Tensor, yarn: dict | None = None) -> torch.Tensor:
    """(cos, sin) pairs [positions, 64] of transformers."""
    length = int(yarn["factor"] * yarn["original_max_position_embeddings"]) if yarn else 65536
    config = DeepseekV4Config(
        compress_ratios=[0, 4, 128], num_hidden_layers=3, rope_scaling=yarn, max_position_embeddings=length
    )
    cos, sin = DeepseekV4RotaryEmbedding(config)(torch.zeros(1), positions[None], layer_type=rope_type)
    return torch.stack((cos[0], sin[0]), dim=-1).flatten(-2)


def test_plain_table_is_that_of_transformers():
    table = rope_table(64, 65536, 1e4)
    assert_bits_equal(table[FEW], judge("main", FEW))


def test_compressed_table_without_yarn_is_that_of_transformers():
    table = rope_table(64, 65536, 1.6e5)
    assert_bits_equal(table[FEW], judge("compress", FEW))


def test_yarn_table_is_that_of_transformers_up_to_a_million_positions():
    positions = torch.cat((FEW, torch.tensor([65536, 131071, 524288, 777777, 1048574, 1048575])))
    table = rope_table(64, 1 << 20, 1.6e5, yarn_factor=16.0, original_positions=65536)
    assert_bits_equal(table[positions], judge("compress", positions, YARN))


@pytest.mark.parametrize("original, factor", [(4096, 4.0), (128, 32.0)])
def test_yarn_table_is_that_of_transformers_for_other_lengths(original, factor):
    """Factors are powers of two: transformers divides by factor * base^x, we (like the release) divide twice."""
    yarn = YARN | {"factor": factor, "original_max_position_embeddings": original}
    table = rope_table(64, 65536, 1.6e5, yarn_factor=factor, original_positions=original)
    assert_bits_equal(table[FEW], judge("compress", FEW, yarn))


@pytest.mark.parametrize("heads", [(), (3,)])
def test_rotation_is_that_of_transformers(heads):
    table = rope_table(16, 64, 1e4)
    positions = torch.tensor([[5, 6, 7], [0, 1, 63]], dtype=torch.int32)
    x = torch.randn(2, 3, *heads, 40, generator=torch.Generator().manual_seed(0))
    rows = table[positions.long()]
    expected = apply_rotary_pos_emb(x.view(2, 3, -1, 40), rows[..., 0::2], rows[..., 1::2], unsqueeze_dim=2)
    assert_bits_equal(apply_rope(x, table, positions), expected.view(x.shape))
    expected = apply_rotary_pos_emb(x.view(2, 3, -1, 40), rows[..., 0::2], -rows[..., 1::2], unsqueeze_dim=2)
    assert_bits_equal(apply_rope(x, table, positions, inverse=True), expected.view(x.shape))


def test_rotation_turns_each_pair_as_a_complex_number():
    """Complex product in fp64; two products and a sum in fp32 err by less than 4 * 2^-24 of the pair's length."""
    table = rope_table(8, 32, 1e4)
    positions = torch.tensor([[31]], dtype=torch.int32)
    x = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(1))
    angle = 31 * 1e4 ** (-torch.arange(0, 8, 2).double() / 8)
    pairs = torch.view_as_complex(x.double().view(4, 2))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones(4).double(), angle)).view(1, 1, 8)
    # The table's angle is fp32: off by up to 31 * 2^-24 from rounding the frequency and as much from the product.
    tolerance = (4 + 2 * 31) * 2**-24 * pairs.abs().repeat_interleave(2)
    assert ((apply_rope(x, table, positions) - expected).abs() <= tolerance).all()


def test_rotation_of_rows_without_a_token_is_finite():
    table = rope_table(8, 4, 1e4)
    x = torch.randn(1, 2, 12, generator=torch.Generator().manual_seed(2))
    out = apply_rope(x, table, torch.tensor([[3, -1]], dtype=torch.int32))
    assert_bits_equal(out[:, 1], x[:, 1])  # as position 0: not turned
