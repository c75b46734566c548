"""Fixtures that several families of GPU tests share."""

import pytest

from dsv4_ops.ops import attention_workspace


@pytest.fixture
def small_chunks_unpack_keys_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large ones do, which a CPU's reference would take long for."""
    monkeypatch.setattr(attention_workspace, "UNPACK_READS", 0)
