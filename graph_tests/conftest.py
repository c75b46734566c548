"""GPU tests carry the mark `cuda`; without a GPU they are skipped, and the report says why."""

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a GPU and the CUDA kernels")
    config.addinivalue_line("markers", "sanitize: a small case of a kernel, run again under compute-sanitizer")
    config.addinivalue_line("markers", "library: runs a kernel of cuBLAS as well, which racecheck is not asked about")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    reason = f"no GPU: torch.cuda.is_available() is False (torch {torch.__version__})"
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=reason))
