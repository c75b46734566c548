"""Rules for the CUDA sources that a machine without a GPU can check: csrc/README.md has them in words."""

import re
from pathlib import Path

import pytest

import dsv4_ops.ops  # noqa: F401  (fills the table)
from dsv4_ops.registry import TABLE, Cuda

CSRC = Path(dsv4_ops.__file__).parent / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp"))
DEVICE_CODE = [path for path in SOURCES if path.suffix in (".cu", ".cuh")]
PTX_UNITS = ("attention", "moe", "wgmma")
PTX_FILES = ("ptx.cuh", "ptx_sm90.cuh", *(f"ptx_sm90_{unit}.cuh" for unit in PTX_UNITS))
PTX = [CSRC / "common" / name for name in PTX_FILES]
NO_TORCH = [path for path in SOURCES if path.suffix != ".cpp" and path.name != "bind.h"]
KERNEL = re.compile(r"__global__\s+void\b[^;{]*?(\w+_kernel)\s*\(", re.DOTALL)
COMMENT = re.compile(r"//[^\n]*")


def code(path: Path) -> str:
    return COMMENT.sub("", path.read_text())


def body(text: str, start: int) -> str:
    """The text between the first brace after `start` and the one that closes it."""
    first = text.index("{", start)
    depth = 0
    for place in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[first : place + 1]
    raise AssertionError("unbalanced braces")


def relative(path: Path) -> str:
    return str(path.relative_to(CSRC))


def test_the_library_registers_what_the_op_table_promises():
    registered = re.findall(r'm\.impl\("(\w+)(\.out)?"', "".join(path.read_text() for path in CSRC.rglob("*.cpp")))
    promised = {(op.name, "" if op.alloc is None else ".out") for op in TABLE.values() if op.cuda is Cuda.KERNEL}
    assert sorted(registered) == sorted(promised)


@pytest.mark.parametrize("path", NO_TORCH, ids=relative)
def test_device_code_and_launchers_include_no_torch_header(path):
    assert not re.search(r"#\s*include\s*<(torch|ATen|c10)/", path.read_text())


@pytest.mark.parametrize("path", DEVICE_CODE, ids=relative)
def test_ptx_stands_in_its_own_files(path):
    assert path in PTX or not re.search(r"\basm\b", code(path))


@pytest.mark.parametrize("path", [path for path in DEVICE_CODE if path.suffix == ".cu"], ids=relative)
def test_kernels_are_launched_as_dependents_and_wait(path):
    """A kernel that ends before it has waited lets its successor overtake the kernels in front of it."""
    text = code(path)
    assert "<<<" not in text and "cudaLaunchKernel" not in text
    kernels = list(KERNEL.finditer(text))
    assert kernels, "no kernel found"
    for kernel in kernels:
        statements = body(text, kernel.end())
        for call in ("launch_dependents()", "wait_for_predecessors()"):
            assert call in statements, f"{kernel[1]} does not call {call}"
        first = statements.index("wait_for_predecessors()"), statements.index("launch_dependents()")
        assert first[0] < first[1], f"{kernel[1]} lets its successor start before it has waited: see common/launch.cuh"
        assert "return" not in statements[: statements.index("wait_for_predecessors()")], f"{kernel[1]} may not wait"


def test_no_fast_math():
    flags = (CSRC.parent / "toolchain.py").read_text() + (CSRC.parent / "build.py").read_text()
    assert "fast_math" not in flags and "-ftz" not in flags
