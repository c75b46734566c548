"""The architectures that kernels are compiled for, the compilers of this machine, and how they are run.

`FLAGS` decide what is in the library and are the same everywhere. A `Tool` is what differs between machines: where the
compiler is, where it searches, and the versions behind it.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# Compute capability -> nvcc's name. The `a` is code for exactly this capability (wgmma, tcgen05); no later GPU runs it.
ARCHS = {(9, 0): "90a", (10, 0): "100a"}
OLDEST_NVCC = (12, 9)
LOCAL = Path("/usr/local")  # where installers of the toolkit put it

# The compilers run in csrc: `-I.` is csrc, and no key depends on where it lies.
FLAGS: Mapping[str, tuple[str, ...]] = {
    # Hidden, so that kernels of two libraries in one process cannot take each other's place.
    ".cu": ("-O3", "-std=c++20", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-I."),
    # Headers of torch 2.13 restricted to the stable interface of 2.11: one library serves every supported torch.
    ".cpp": (
        *("-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-I."),
        *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"),
    ),
    # Where torch is for the CPU, symbols of libtorch_cuda stay undefined. So the linker only lists what is undefined,
    # and the builder refuses what is ours.
    "link": (
        *("-shared", "-Wl,-z,defs", "-Wl,--warn-unresolved-symbols"),
        # Nothing of ours need use a torch symbol directly, but the library must name torch to see torch's symbols.
        *("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-lcudart"),
    ),
}


class BuildError(RuntimeError):
    """The CUDA library cannot be built, found or loaded: what was expected, what came, how to fix it."""


@dataclass(frozen=True)
class Tool:
    """A compiler of this machine: executable, `-I` or `-L` options, and the versions that can change its output."""

    executable: str
    search: tuple[str, ...] = ()
    identity: str = ""


@dataclass(frozen=True)
class Step:
    """One command of a build and the file it makes. `name` is what progress and errors call it."""

    name: str
    command: tuple[str, ...]
    output: Path


def canonical_archs(archs: Iterable[str], origin: str = "archs") -> tuple[str, ...]:
    """The architectures in one order and once each, or an error that names those allowed."""
    archs = list(archs)
    unknown = [arch for arch in archs if arch not in ARCHS.values()]
    if unknown or not archs:
        got = ", ".join(map(repr, unknown)) or "none"
        raise BuildError(f'{origin} must name some of {", ".join(ARCHS.values())}, as in "90a;100a"; got {got}')
    return tuple(arch for arch in ARCHS.values() if arch in archs)


def detect_archs(gpus: Sequence[tuple[str, tuple[int, int]]] | None = None) -> tuple[str, ...]:
    """$DSV4_ARCHS, or what the visible GPUs (name, capability) need, or every architecture where there is no GPU."""
    if wanted := os.environ.get("DSV4_ARCHS", "").strip():
        return canonical_archs(re.findall(r"[^;,\s]+", wanted), "DSV4_ARCHS")
    gpus = visible_gpus() if gpus is None else gpus
    for name, capability in gpus:
        if capability not in ARCHS:
            supported = ", ".join(f"{major}.{minor} (sm_{arch})" for (major, minor), arch in ARCHS.items())
            raise BuildError(
                f"the visible GPU {name} has compute capability {capability[0]}.{capability[1]}; the kernels run on "
                f"{supported} and on no other. Hide it with CUDA_VISIBLE_DEVICES, or use the CPU."
            )
    return canonical_archs(ARCHS[capability] for _, capability in gpus) if gpus else tuple(ARCHS.values())


def visible_gpus() -> list[tuple[str, tuple[int, int]]]:
    """Name and compute capability of each GPU that torch sees."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    indices = range(torch.cuda.device_count())
    return [(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)) for index in indices]


def arch_flags(archs: Sequence[str]) -> tuple[str, ...]:
    """What makes nvcc compile for `archs`."""
    return tuple(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)


def find_toolchain() -> dict[str, Tool]:
    """The tools for `.cu`, `.cpp` and `link`, or an error that says what is missing and where it was looked for."""
    gxx = shutil.which("g++")
    if gxx is None:
        raise BuildError("no g++ on PATH; nvcc and the registration of the kernels need it. Install g++ (11 or newer).")
    nvcc = find_nvcc()
    nvcc_version = _output(nvcc, "--version")
    check_nvcc(nvcc, nvcc_version)
    # nvcc knows its own folders, also when what was found is a script that calls another nvcc.
    layout = _output(nvcc, "--dryrun", "-x", "cu", os.devnull)
    cuda = {line[3:].split("=")[0]: tuple(re.findall(r'"(-[IL][^"]+)"', line)) for line in layout.splitlines()}
    own = Path(torch.__file__).parent
    environment = [os.environ.get(name, "") for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")]
    versions = "\n".join([nvcc_version, _output(gxx, "--version"), *environment])
    headers = (f"-I{own / 'include'}", *cuda.get("INCLUDES", ()))
    libraries = (f"-L{own / 'lib'}", *cuda.get("LIBRARIES", ()))
    return {
        ".cu": Tool(nvcc, (), versions),
        ".cpp": Tool(gxx, headers, f"{versions}\ntorch {torch.__version__}"),
        "link": Tool(gxx, libraries),
    }


def find_nvcc() -> str:
    """The nvcc of $CUDA_HOME, of PATH, or of /usr/local."""
    home = os.environ.get("CUDA_HOME")
    folders = [Path(home, "bin")] if home else []
    folders += [Path(folder) for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder]
    folders += [LOCAL / "cuda/bin", *sorted(LOCAL.glob("cuda-13*/bin"), reverse=True)]
    if nvcc := shutil.which("nvcc", path=os.pathsep.join(map(str, folders))):
        return nvcc
    raise BuildError(
        f"no nvcc in $CUDA_HOME/bin ({home or 'CUDA_HOME is not set'}), on PATH, in {LOCAL}/cuda/bin or in "
        f"{LOCAL}/cuda-13*/bin. Install the CUDA toolkit (13.0, say) or set CUDA_HOME to it; or build with "
        "`dsv4 build` on a machine that has it and bring the cache folder (DSV4_CACHE) here."
    )


def check_nvcc(nvcc: str, version: str) -> None:
    """Refuse an nvcc that is too old, or whose runtime library is not the one that torch has loaded."""
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None:
        raise BuildError(f"{nvcc} --version names no release; it printed:\n{version}")
    major, minor = map(int, release.groups())
    if (major, minor) < OLDEST_NVCC:
        oldest = ".".join(map(str, OLDEST_NVCC))
        raise BuildError(
            f"{nvcc} is release {major}.{minor}; {oldest} or newer is needed. Set CUDA_HOME to a newer one."
        )
    if torch.version.cuda is not None and int(torch.version.cuda.split(".")[0]) != major:
        raise BuildError(
            f"{nvcc} is release {major}.{minor} and torch is built for CUDA {torch.version.cuda}: their runtime "
            "libraries differ. Set CUDA_HOME to a toolkit of torch's major version."
        )


def find_ninja() -> str:
    """The ninja of the Python package, else the one on PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    path = os.pathsep.join([BIN_DIR] * bool(BIN_DIR) + [os.environ.get("PATH", os.defpath)])
    if ninja := shutil.which("ninja", path=path):
        return ninja
    raise BuildError("no ninja in this Python's packages or on PATH. Install it: pip install ninja")


def run_steps(steps: Sequence[Step], folder: Path, cwd: Path) -> Iterator[tuple[Step, bool, str]]:
    """Run independent commands in `cwd`, one a core, with ninja; yield (step, succeeded, output) as each one ends.

    After a failure no further step starts. `folder` takes the logs and the compilers' temporary files.
    """
    mark = "\x1e"  # how ninja, which prints the index of a step when it has ended, begins that line
    script = "".join(_ninja_rule(index, step, folder) for index, step in enumerate(steps))
    (folder / "build.ninja").write_text(f"builddir = {_ninja_escape(str(folder))}\n{script}")
    environment = {**os.environ, "NINJA_STATUS": mark, "LC_ALL": "C", "TMPDIR": str(folder)}
    jobs = str(len(os.sched_getaffinity(0)))
    command = [find_ninja(), "-f", str(folder / "build.ninja"), "-j", jobs]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
    all_ran, other = True, []
    with subprocess.Popen(command, cwd=cwd, env=environment, **pipes) as ninja:
        try:
            for line in ninja.stdout:
                if not line.startswith(mark):
                    other.append(line)
                    continue
                index = int(line.removeprefix(mark))
                succeeded = steps[index].output.exists()
                all_ran &= succeeded
                yield steps[index], succeeded, (folder / f"{index}.log").read_text(errors="replace")
        finally:
            if ninja.poll() is None:
                ninja.terminate()  # ninja then ends its compilers
    if ninja.returncode and all_ran:
        raise BuildError(f"ninja ended with status {ninja.returncode}:\n{''.join(other)}")


def _ninja_rule(index: int, step: Step, folder: Path) -> str:
    # The output gets its name when it is complete: a compiler that was killed leaves no file that looks finished.
    part, log = f"{step.output}.part", str(folder / f"{index}.log")
    command = shlex.join(part if word == str(step.output) else word for word in step.command)
    command = f"{command} > {shlex.quote(log)} 2>&1 && mv {shlex.quote(part)} {shlex.quote(str(step.output))}"
    return (
        f"rule r{index}\n  command = {command.replace('$', '$$')}\n  description = {index}\n"
        f"build {_ninja_escape(str(step.output))}: r{index}\n"
    )


def _ninja_escape(path: str) -> str:
    return re.sub(r"([$ :])", r"$\1", path)


def _output(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode:
        raise BuildError(f"`{shlex.join(command)}` fails:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr
