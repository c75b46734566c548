"""Every op has something to run on CUDA: the kernel that csrc registers, or the reference where the table says so."""

import pytest

from dsv4_ops.registry import TABLE, Cuda

pytestmark = pytest.mark.cuda


def test_every_op_has_a_kernel():
    loaded = {op.name for op in TABLE.values() if op.has_kernel("cuda")}
    assert loaded == set(TABLE)
    assert {op.name for op in TABLE.values() if op.cuda is Cuda.REFERENCE} <= loaded
