"""Sparse attention with queries as E4M3 codes and rope dimensions: what it computes, what it costs, what it refuses."""

import pytest
import torch

from dsv4_ops.ops.attention_mixed import split_queries
from graph_tests import checks
from graph_tests.ops.attention_cases import FULL, SMALL
from graph_tests.ops.attention_mixed_cases import LAYOUTS, SEQUENCE_ARGUMENTS, make_mixed

OPS = torch.ops.dsv4
NAME = "sparse_attention_mixed"


def rows_from(start: int, rows: int) -> list[int]:
    return list(range(start, start + rows))


@pytest.mark.parametrize("dims", [SMALL, FULL])
def test_is_attention_of_the_queries_that_the_parts_stand_for(dims):
    arguments, (_, *others) = make_mixed([rows_from(0, 4), rows_from(60, 4), [7, 8, -1, -1]], dims=dims)
    q_nope, q_scale, q_rope = arguments[:3]
    q = torch.cat((q_nope.float() * q_scale[..., None], q_rope.float()), -1)
    o, lse = OPS.sparse_attention_selected(q, *others)
    mixed_o, mixed_lse = OPS.sparse_attention_mixed(*arguments)
    checks.assert_bits_equal(mixed_o, o.bfloat16())
    checks.assert_bits_equal(mixed_lse, lse)


def test_cost_of_rounding_the_queries():
    """What the docstring says of N(0, 1) keys: here with a seed of its own, and a fifth more."""
    positions = [[1000 + b, 1001 + b] for b in range(4)]
    options = {"dims": FULL, "heads": 64, "window": 128, "pages": (64, 64), "k": 250}
    arguments, (q, *others) = make_mixed(positions, **options)
    for pool in others[:2]:
        pool[:, 64 * 576 : 64 * 584] = 127  # scales of 1
    exact, exact_lse = OPS.sparse_attention_selected(q.float(), *others)
    o, lse = OPS.sparse_attention_mixed(*arguments)
    error = o.float() - exact
    assert error.square().mean().sqrt() < 0.03 * exact.square().mean().sqrt()
    assert error.square().sum() / (o.float().square().sum() + exact.square().sum()) < 3.6e-4
    assert (lse - exact_lse).square().mean().sqrt() < 2.9e-3 and (lse - exact_lse).abs().max() < 1.1e-2


@pytest.mark.parametrize("layouts", [(a, b, c) for a in LAYOUTS for b in LAYOUTS for c in LAYOUTS])
def test_parts_of_any_strides(layouts):
    """A kernel that takes the stride of heads for that of rows is right with one row and wrong with more."""
    positions = [rows_from(20, 3), rows_from(5, 3)]
    expected = OPS.sparse_attention_mixed(*make_mixed(positions)[0])
    for actual, wanted in zip(OPS.sparse_attention_mixed(*make_mixed(positions, layouts)[0]), expected, strict=True):
        checks.assert_bits_equal(actual, wanted)


def test_split_queries_scales_the_largest_value_to_448():
    q = torch.tensor([[[[3.0, -7.0, 0.5, 1.0, 2.0, 4.0], [0.0, 0.0, 0.0, 0.0, 5.0, 6.0]]]])
    codes, scale, rope = split_queries(q, 2)
    assert codes.float().abs().amax(-1).flatten().tolist() == [448.0, 0.0]
    torch.testing.assert_close(scale.flatten(), torch.tensor([7.0 / 448, 1e-4 / 448]))
    assert rope.dtype == torch.bfloat16 and rope.flatten().tolist() == [2.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_contract(batch):
    arguments, _ = make_mixed([[20 + b, 21 + b] for b in range(max(batch, 1))])
    cut = tuple(a[:batch] if place in SEQUENCE_ARGUMENTS else a for place, a in enumerate(arguments))
    checks.check_op(NAME, cut)
    checks.check_op(NAME, tuple(checks.row_strided(a) if i in (0, 2, 9) else a for i, a in enumerate(cut)))


def test_no_guard_on_the_batch():
    def arguments(batch: int) -> tuple:
        return make_mixed([[20 + b, 21 + b] for b in range(batch)])[0]

    checks.check_symbolic_batch(NAME, arguments)
    checks.opcheck(NAME, arguments(3))


def test_wrong_arguments_are_named():
    q_nope, q_scale, q_rope, *rest = make_mixed([[20, 21]])[0]
    with pytest.raises(ValueError, match="q_nope must be .* float8_e4m3fn"):
        OPS.sparse_attention_mixed(q_nope.float(), q_scale, q_rope, *rest)
    with pytest.raises(ValueError, match=r"q_scale must be \[B, 2, 8\] float32"):
        OPS.sparse_attention_mixed(q_nope, q_scale[..., :4], q_rope, *rest)
    with pytest.raises(ValueError, match="q_rope must be"):
        OPS.sparse_attention_mixed(q_nope, q_scale, q_rope.float(), *rest)
    with pytest.raises(ValueError, match="pools must be packed"):
        plain = torch.zeros(rest[0].shape[0], 5 * 80)
        OPS.sparse_attention_mixed(q_nope, q_scale, q_rope, plain, *rest[1:])
