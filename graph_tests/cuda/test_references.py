"""Ops whose reference is registered for CUDA: the same numbers as on a CPU, and safe in a CUDA graph."""

import pytest
import torch

from dsv4_ops.registry import TABLE, Cuda
from graph_tests.cuda.kernel_checks import check_kernel, close

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("rows", [1, 6, 40])
def test_dense_experts(rows):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 64, generator=generator).bfloat16()
    w1, w3 = (torch.randn(8, 96, 64, generator=generator).bfloat16() / 8 for _ in range(2))
    w2 = torch.randn(8, 64, 96, generator=generator).bfloat16() / 8
    ids = torch.randint(-1, 8, (rows, 2), generator=generator, dtype=torch.int32)
    weights = torch.rand(rows, 2, generator=generator)
    # Three products of bf16 operands with their outputs rounded to bf16: a rounding that falls the other way moves the
    # result by 2^-8 of one of its terms.
    check_kernel("moe_dense", (x, ids, weights, w1, w3, w2, 10.0), close(2.0**-6, 2e-2))


def test_every_other_op_has_a_kernel():
    loaded = {op.name for op in TABLE.values() if op.has_kernel("cuda")}
    assert loaded == set(TABLE)
    assert {op.name for op in TABLE.values() if op.cuda is Cuda.REFERENCE} < loaded
