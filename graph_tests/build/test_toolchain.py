"""Which architectures, which compilers, and a CUDA library for both architectures on a machine without a GPU."""

import io
import re
import shutil
import subprocess
import sys

import pytest
import torch

from dsv4_ops import toolchain
from dsv4_ops.build import BuildError, Project, build, detect_archs

H100, B200, B300 = ("NVIDIA H100", (9, 0)), ("NVIDIA B200", (10, 0)), ("NVIDIA B300", (10, 3))
NVCC_130 = "Cuda compilation tools, release 13.0, V13.0.88"

KERNEL = """
#include "common/factor.cuh"
namespace dsv4 {
__global__ void scale_kernel(float* x) {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(__CUDA_ARCH_FEAT_SM100_ALL)
#error "compiled for another architecture"
#endif
  x[threadIdx.x] *= kFactor;
}
void launch_scale(float* x, cudaStream_t stream) { scale_kernel<<<1, 32, 0, stream>>>(x); }
}
"""
BINDING = """
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>
namespace dsv4 { void launch_scale(float*, cudaStream_t); }
extern "C" void scale(float* x) {
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(0, &stream);
  dsv4::launch_scale(x, static_cast<cudaStream_t>(stream));
}
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with nothing installed; `machine(folder, name, output)` installs a program that prints `output`."""

    def install(folder, name, output):
        program = tmp_path / folder / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/sh\necho '{output}'\n")
        program.chmod(0o755)
        return str(program)

    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(toolchain, "LOCAL", tmp_path / "local")
    monkeypatch.setattr(torch.version, "cuda", None)
    return install


@pytest.fixture(autouse=True)
def no_archs_in_the_environment(monkeypatch):
    monkeypatch.delenv("DSV4_ARCHS", raising=False)


@pytest.mark.parametrize(
    ("gpus", "archs"),
    [([], ("90a", "100a")), ([H100], ("90a",)), ([B200, B200], ("100a",)), ([B200, H100], ("90a", "100a"))],
    ids=["no GPU", "Hopper", "two of one kind", "both"],
)
def test_archs_are_those_of_the_visible_gpus(gpus, archs):
    assert detect_archs(gpus) == archs


def test_visible_gpus_come_from_torch(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert toolchain.visible_gpus() == [("GPU 0", (9, 0)), ("GPU 1", (9, 0))]
    assert detect_archs() == ("90a",)


def test_gpus_of_another_maker_are_not_asked(monkeypatch):
    """gfx90a has capability 9.0 and is no sm_90a."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert toolchain.visible_gpus() == []


@pytest.mark.parametrize("gpus", [[B300], [H100, ("NVIDIA T4", (7, 5))]], ids=["newer than sm_100a", "one of two"])
def test_gpu_that_is_not_supported_is_named(gpus):
    name, (major, minor) = gpus[-1]
    with pytest.raises(BuildError) as error:
        detect_archs(gpus)
    message = str(error.value)
    assert f"{name} has compute capability {major}.{minor}" in message
    assert "9.0 (sm_90a), 10.0 (sm_100a)" in message and "CUDA_VISIBLE_DEVICES" in message


@pytest.mark.parametrize("text", ["100a;90a", "90a,100a", " 90a 100a ", "90a;90a;100a;"])
def test_archs_of_the_environment_come_before_the_gpus(monkeypatch, text):
    monkeypatch.setenv("DSV4_ARCHS", text)
    assert detect_archs([B300]) == ("90a", "100a")


@pytest.mark.parametrize(("text", "got"), [("90", "'90'"), ("sm_90a", "'sm_90a'"), ("90a;120", "'120'"), (";", "none")])
def test_unknown_archs_of_the_environment_are_named(monkeypatch, text, got):
    monkeypatch.setenv("DSV4_ARCHS", text)
    with pytest.raises(BuildError, match=rf'DSV4_ARCHS must name some of 90a, 100a, as in "90a;100a"; got {got}'):
        detect_archs()


def test_unknown_archs_of_a_caller_are_named():
    with pytest.raises(BuildError, match="archs must name some of 90a, 100a"):
        build(["sm_90"])


def test_missing_nvcc_says_where_it_was_looked_for(machine, tmp_path, monkeypatch):
    machine("path", "g++", "g++ 12")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "no toolkit"))
    monkeypatch.setenv("DSV4_CACHE", str(tmp_path / "cache"))
    with pytest.raises(BuildError) as error:
        build(["90a"])
    for place in (f"$CUDA_HOME/bin ({tmp_path}/no toolkit)", "PATH", "local/cuda/bin", "local/cuda-13*/bin"):
        assert place in str(error.value)
    assert "Install the CUDA toolkit" in str(error.value) and "DSV4_CACHE" in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_missing_gxx(machine):
    with pytest.raises(BuildError, match=r"no g\+\+ on PATH"):
        toolchain.find_toolchain()


def test_missing_ninja(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(BuildError, match="pip install ninja"):
        toolchain.find_ninja()
    ninja = machine("path", "ninja", "1.13")
    assert toolchain.find_ninja() == ninja


def test_order_in_which_nvcc_is_looked_for(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    for folder in ("local/cuda-13.0/bin", "local/cuda-13.2/bin", "local/cuda/bin", "path", "home/bin"):
        newest = machine(folder, "nvcc", NVCC_130)
        if folder != "local/cuda-13.0/bin":
            assert toolchain.find_nvcc() == newest


@pytest.mark.parametrize("release", ["12.8", "11.0"])
def test_nvcc_that_is_too_old(machine, release):
    machine("path", "g++", "g++ 12")
    nvcc = machine("path", "nvcc", f"Cuda compilation tools, release {release}, V{release}.1")
    with pytest.raises(BuildError, match=rf"{re.escape(nvcc)} is release {release}; 12.9 or newer is needed"):
        toolchain.find_toolchain()


def test_nvcc_of_another_major_version_than_torch(machine, monkeypatch):
    machine("path", "g++", "g++ 12")
    machine("path", "nvcc", NVCC_130)
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    with pytest.raises(BuildError, match=r"release 13\.0 and torch is built for CUDA 12\.9"):
        toolchain.find_toolchain()


def test_nvcc_that_does_not_run(machine, tmp_path):
    machine("path", "g++", "g++ 12")
    machine("path", "nvcc", "cannot run'; exit 1; echo '")
    with pytest.raises(BuildError, match="nvcc --version` fails:\ncannot run"):
        toolchain.find_toolchain()


def test_options_that_nvcc_takes_from_the_environment_are_part_of_its_identity(machine, monkeypatch):
    machine("path", "g++", "g++ 12")
    machine("path", "nvcc", NVCC_130)
    monkeypatch.setattr(toolchain.torch, "__file__", "/torch/__init__.py")
    before = toolchain.find_toolchain()[".cu"].identity
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G")
    assert toolchain.find_toolchain()[".cu"].identity != before


try:
    NVCC = toolchain.find_nvcc()
except BuildError:
    NVCC = None


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_cuda_library_for_both_architectures(cache, tmp_path):
    csrc = tmp_path / "csrc"
    for name, text in {"common/factor.cuh": "constexpr float kFactor = 2;\n", "scale/scale.cu": KERNEL}.items():
        (csrc / name).parent.mkdir(parents=True)
        (csrc / name).write_text(text)
    (csrc / "scale/bind.cpp").write_text(BINDING)
    project = Project(csrc=csrc)
    library = build(["90a", "100a"], project, progress=io.StringIO())
    assert library.parent == cache and re.fullmatch(r"dsv4_cuda-[0-9a-f]{20}\.so", library.name)

    dynamic = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(\w+)\.so", dynamic)
    assert {"libtorch", "libtorch_cpu", "libc10", "libcudart"} <= set(needed)
    assert not re.search("RPATH|RUNPATH", dynamic)

    if cuobjdump := shutil.which("cuobjdump", path=f"{toolchain.LOCAL}/cuda/bin"):
        kernels = subprocess.run([cuobjdump, "--list-elf", str(library)], capture_output=True, text=True).stdout
        assert sorted(re.findall(r"sm_\d+a?", kernels)) == ["sm_100a", "sm_90a"]


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_failing_kernel_shows_the_lines_of_nvcc(cache, tmp_path):
    (tmp_path / "csrc/scale").mkdir(parents=True)
    (tmp_path / "csrc/scale/scale.cu").write_text("__global__ void scale_kernel(float* x) { *x = undefined_thing; }\n")
    with pytest.raises(BuildError, match=r'scale/scale\.cu\(1\): error: identifier "undefined_thing" is undefined'):
        build(["90a"], Project(csrc=tmp_path / "csrc"), progress=io.StringIO())
