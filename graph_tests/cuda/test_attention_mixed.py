"""Sparse attention for queries in two parts on the GPU against its reference."""

import pytest
import torch

from graph_tests.checks import assert_bits_equal
from graph_tests.cuda.kernel_checks import assert_rows_independent, check_kernel, close, on_cuda
from graph_tests.cuda.test_attention import TENSOR, rows_from
from graph_tests.ops.attention_cases import FULL, SMALL
from graph_tests.ops.attention_mixed_cases import LAYOUTS, SEQUENCE_ARGUMENTS, make_mixed

pytestmark = pytest.mark.cuda

OPS = torch.ops.dsv4
NAME = "sparse_attention_mixed"
PLAIN = (close(2.0**-7, 2e-5), close(1e-6, 1e-5))


def full(positions: list[list[int]], **options) -> tuple:
    defaults = {"window": 128, "pages": (64, 64), "k": 100, "heads": 16}
    return make_mixed(positions, dims=FULL, **(defaults | options))[0]


@pytest.mark.sanitize
def test_window_boundaries():
    check_kernel(NAME, full([[position] for position in (0, 1, 126, 127, 128, 129, 130)]), TENSOR)


@pytest.mark.parametrize("heads", [8, 24, 64, 72, 128])
def test_head_counts(heads):
    check_kernel(NAME, full([[300], [9]], heads=heads), TENSOR)


@pytest.mark.parametrize("page_size", [2, 61, 256])
def test_page_sizes(page_size):
    check_kernel(NAME, full([[1000], [255], [63]], pages=(page_size, page_size)), TENSOR)


@pytest.mark.parametrize("keys", [0, 1, 63, 64, 65, 512, 1024])
def test_numbers_of_selected_entries(keys):
    check_kernel(NAME, full([[2047], [900]], ratio=1, k=keys), TENSOR)


@pytest.mark.parametrize("layout", range(len(LAYOUTS)))
def test_strides_of_heads_and_of_rows(layout):
    """A kernel that takes the stride of heads for that of rows is right with one row and wrong with more."""
    positions = [rows_from(200, 3), rows_from(50, 3)]
    layouts = tuple(LAYOUTS[(layout + part) % len(LAYOUTS)] for part in range(3))
    arguments = make_mixed(positions, layouts, dims=FULL, window=128, pages=(64, 64), k=100, heads=16)[0]
    check_kernel(NAME, arguments, TENSOR)


def test_padding_rows_are_zero():
    positions = [[7, 8, -1, -1], [-1, -1, -1, -1], [200, 201, 202, 203], [0, -1, -1, -1]]
    arguments = full(positions)
    check_kernel(NAME, arguments, TENSOR)
    o, lse = OPS.sparse_attention_mixed(*on_cuda(arguments))
    empty = torch.tensor(positions) < 0
    assert (o.cpu()[empty] == 0).all() and (lse.cpu()[empty] == -torch.inf).all()


def test_a_row_alone_has_the_bits_of_the_row_in_a_batch():
    arguments = full([[40 + b * 5, 41 + b * 5] for b in range(80)], heads=64)
    assert_rows_independent(NAME, arguments, SEQUENCE_ARGUMENTS, rows=(0, 1, 33, 79))


@pytest.mark.parametrize("heads", [40, 64, 128])
def test_chunk(heads):
    check_kernel(NAME, full([rows_from(0, 140)], heads=heads), TENSOR)


@pytest.mark.sanitize
def test_short_chunk():
    check_kernel(NAME, full([rows_from(100, 128)], heads=64, k=40), TENSOR)


def test_twenty_runs_give_the_same_bits():
    arguments = on_cuda(full([[500, 501], [77, 78]], heads=64))
    first, *others = [OPS.sparse_attention_mixed(*arguments) for _ in range(20)]
    for other in others:
        for one, another in zip(first, other, strict=True):
            assert_bits_equal(another.cpu(), one.cpu())


@pytest.mark.sanitize
def test_plain_kernel():
    arguments = make_mixed([[0, 1], [126, 127], [200, -1], [-1, -1]], window=32, pages=(61, 2), k=30, dims=SMALL)[0]
    check_kernel(NAME, arguments, PLAIN)


def test_wrong_arguments_are_named():
    q_nope, q_scale, q_rope, *rest = on_cuda(full([[20, 21]]))
    o = torch.empty(*q_nope.shape[:-1], FULL[0], dtype=torch.bfloat16, device="cuda")
    lse = torch.empty(q_nope.shape[:-1], device="cuda")
    out = OPS.sparse_attention_mixed.out
    with pytest.raises(RuntimeError, match="q_nope must be vectors .* multiples of 16 bytes"):
        odd = torch.zeros(*q_nope.shape[:-1], 449, dtype=torch.uint8, device="cuda").view(q_nope.dtype)[..., :448]
        out(odd, q_scale, q_rope, *rest, o=o, lse=lse)
    with pytest.raises(RuntimeError, match="q_scale must be"):
        out(q_nope, q_scale[:, :, :4], q_rope, *rest, o=o, lse=lse)
    with pytest.raises(RuntimeError, match="q_rope must be"):
        out(q_nope, q_scale, q_rope.float(), *rest, o=o, lse=lse)
    with pytest.raises(RuntimeError, match="o must be"):
        out(q_nope, q_scale, q_rope, *rest, o=o.float(), lse=lse)
