"""The library in torch. What is loaded here holds no kernel, so that a torch without CUDA can load it too."""

import pytest
import torch

from dsv4_ops.build import BuildError, load
from graph_tests.build.tiny_project import ALL


@pytest.fixture
def torch_with_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("DSV4_ARCHS", "90a")


def test_load_builds_once_and_registers_once(tiny, torch_with_cuda):
    library = load(tiny.project)
    assert str(library) in torch.ops.loaded_libraries
    assert tiny.compiled() == ["link", *ALL]
    tiny.write("norm/norm.h", "constexpr int kScale = 3;\n")
    assert load(tiny.project) == library
    assert tiny.compiled() == []


def test_load_without_building(tiny, torch_with_cuda, monkeypatch):
    monkeypatch.setenv("DSV4_NO_BUILD", "1")
    with pytest.raises(BuildError) as error:
        load(tiny.project)
    assert "no library of these sources for sm_90a" in str(error.value)
    assert "DSV4_ARCHS='90a' dsv4 build" in str(error.value)
    assert tiny.compiled() == []
    library, _ = tiny.build()
    assert load(tiny.project) == library


def test_library_that_does_not_load_is_named_with_the_cause(tiny, torch_with_cuda):
    tiny.write("norm/norm.cpp", 'extern "C" int of_another_torch();\nint norm() { return of_another_torch(); }\n')
    with pytest.raises(BuildError, match=r"tiny-\w+\.so does not load into torch(.|\n)*of_another_torch"):
        load(tiny.project)


def test_torch_without_cuda_does_not_load_the_library(tiny, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BuildError, match="built without CUDA"):
        load(tiny.project)
    assert tiny.compiled() == []
