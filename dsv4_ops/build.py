"""Builds csrc/ into one shared library: content-addressed, for many processes at once, of which any may be killed.

There is no build tree and no timestamp. The cache folder, $DSV4_CACHE or ~/.cache/dsv4_ops, holds

    <source>-<key>.o      an object; key: flags, compiler versions, contents of the source and of all that it includes
    dsv4_cuda-<key>.so    the library; key: contents of all of csrc, architectures, flags, processor
    <either>.sha256       its checksum, written last: without a matching one there is no artifact
    dsv4_cuda.lock        locked by the one process that builds; the text says who
    dsv4_cuda.build-*     what that process is compiling; if it dies, the next one to hold the lock removes it

The key of the library has no compiler version in it, so a library that was built ahead of time, by CI or on another
machine, is found where there is no compiler at all. The price: another g++ or nvcc alone does not rebuild it. The key of
an object has them, so that objects of two compilers are never linked into one library.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import IO, TextIO

import torch

from dsv4_ops.toolchain import (
    ARCHS,
    FLAGS,
    BuildError,
    Step,
    Tool,
    arch_flags,
    canonical_archs,
    detect_archs,
    find_toolchain,
    run_steps,
)

__all__ = ["BuildError", "Project", "build", "cache_folder", "detect_archs", "find_library", "load", "source_hash"]

CSRC = Path(__file__).resolve().parent / "csrc"
INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*(?:(["<])([^">\n]+)[">]|(\w+))', re.MULTILINE)


@dataclass(frozen=True, eq=False)
class Project:
    """What is built: the sources, the flags, and how the compilers are found once one is needed."""

    name: str = "dsv4_cuda"
    csrc: Path = CSRC
    flags: Mapping[str, tuple[str, ...]] = FLAGS
    toolchain: Callable[[], Mapping[str, Tool]] = find_toolchain


DSV4 = Project()


def build(archs: Sequence[str] | None = None, project: Project = DSV4, *, progress: TextIO | None = None) -> Path:
    """The library for `archs` (default: `detect_archs`), compiled if the cache has none; lines on stderr or `progress`."""
    archs = detect_archs() if archs is None else canonical_archs(archs)
    if library := find_library(archs, project):
        return library
    toolchain = project.toolchain()
    cache = cache_folder()
    say = Progress(progress)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f"{project.name}.lock", f"{project.name} for {_sm(archs)}", say):
            return find_library(archs, project) or _build(archs, project, toolchain, cache, say)
    except OSError as error:
        message = f"cannot build in the cache folder {cache}: {error}. Set DSV4_CACHE to a folder that can be written"
        raise BuildError(message) from error


def find_library(archs: Sequence[str], project: Project = DSV4) -> Path | None:
    """The intact library of these sources for `archs`, or one for more architectures, without building anything."""
    archs = canonical_archs(archs)
    others = [arch for arch in ARCHS.values() if arch not in archs]
    for count in range(len(others) + 1):
        for more in combinations(others, count):
            path = cache_folder() / library_name(canonical_archs([*archs, *more]), project)
            if is_intact(path):
                return path
    return None


@functools.cache
def load(project: Project = DSV4) -> Path:
    """Load the library for the visible GPUs into torch, compiled if need be; once, as it registers kernels."""
    if torch.version.cuda is None:
        raise BuildError(f"torch {torch.__version__} is built without CUDA and cannot load the CUDA library")
    archs = detect_archs()
    library = find_library(archs, project)
    if library is None and os.environ.get("DSV4_NO_BUILD", "0") not in ("", "0"):
        raise BuildError(
            f"DSV4_NO_BUILD is set and {cache_folder()} has no library of these sources for {_sm(archs)}. "
            f"Build it ahead of time: DSV4_ARCHS={';'.join(archs)!r} dsv4 build; or unset DSV4_NO_BUILD."
        )
    library = library or build(archs, project)
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise BuildError(
            f"{library} does not load into torch {torch.__version__} (CUDA {torch.version.cuda}): "
            f"{error.__cause__ or error}. If it was built elsewhere, delete it and run `dsv4 build` here."
        ) from error
    return library


def source_hash(csrc: Path = CSRC) -> str:
    """SHA-256 over the names and contents of all files in `csrc`, hidden ones (of editors) left out."""
    names = sorted(path.relative_to(csrc).as_posix() for path in csrc.rglob("*") if path.is_file())
    visible = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    return hashlib.sha256(json.dumps([[name, file_hash(csrc / name)] for name in visible]).encode()).hexdigest()


def cache_folder() -> Path:
    """$DSV4_CACHE, or ~/.cache/dsv4_ops."""
    return Path(os.environ.get("DSV4_CACHE") or "~/.cache/dsv4_ops").expanduser().absolute()


def library_name(archs: Sequence[str], project: Project) -> str:
    """The file name of the library: it depends on the sources and on how they are built, not on who builds them."""
    flags = {kind: list(options) for kind, options in project.flags.items()}
    return f"{project.name}-{_key(source_hash(project.csrc), archs, flags, platform.machine())}.so"


def object_name(source: Path, archs: Sequence[str], project: Project, tool: Tool) -> str:
    """The file name of the object of `source`, a path relative to csrc."""
    files = closure(project.csrc / source, project.csrc)
    contents = [[os.path.relpath(file, project.csrc), file_hash(file)] for file in files]
    key = _key(_compile_flags(source, archs, project), tool.identity, contents, platform.machine())
    return f"{'_'.join(source.with_suffix('').parts)}-{key}.o"


def closure(source: Path, csrc: Path) -> list[Path]:
    """`source` and all files of the project that it includes: beside the including file if quoted, or below `csrc`."""
    reached, pending = [], [source]
    while pending:
        file = pending.pop()
        if file in reached:
            continue
        reached.append(file)
        for quote, name, macro in INCLUDE.findall(file.read_bytes()):
            if macro:
                raise BuildError(f"{file}: #include {macro.decode()}: write the name, the builder expands no macros")
            folders = [file.parent, csrc] if quote == b'"' else [csrc]
            found = (Path(os.path.normpath(folder / os.fsdecode(name))) for folder in folders)
            pending += [path for path in found if path.is_file()][:1]
    return reached


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_intact(path: Path) -> bool:
    """Whether a complete artifact is at `path`: an empty, cut, altered or half-published one is as good as none."""
    try:
        return _checksum(path).read_bytes() == file_hash(path).encode()
    except OSError:
        return False


def publish(made: Path, path: Path) -> None:
    """Move the artifact `made` to `path`. If this process dies between the two steps, the artifact is not intact."""
    checksum = _checksum(made)
    checksum.write_text(file_hash(made))
    os.replace(made, path)
    os.replace(checksum, _checksum(path))


@contextlib.contextmanager
def locked(path: Path, task: str, say: "Progress") -> Iterator[None]:
    """Hold the lock at `path`. The kernel frees it when the holder dies, however it dies; what remains is a file.

    That file is never removed: two processes could then hold locks on two files of the same name.
    """
    with open(path, "a+") as file:
        _acquire(file, path, say)
        try:
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            print(f"pid {os.getpid()} on {socket.gethostname()}, building {task} since {since}", file=file, flush=True)
            yield
            file.truncate(0)
        finally:
            # Closing is not enough: a child that another thread forked meanwhile has the same open file.
            fcntl.flock(file, fcntl.LOCK_UN)


def _acquire(file: IO, path: Path, say: "Progress") -> None:
    owner = ""
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)  # before reading, so that a new holder has written who it is
        file.seek(0)
        if (text := file.read().strip()) and text != owner:
            owner = text
            say.line(f"waiting for {owner} ({path})")


def _build(archs: Sequence[str], project: Project, toolchain: Mapping[str, Tool], cache: Path, say: "Progress") -> Path:
    """Compile what the cache lacks, link, publish. The caller holds the lock."""
    start = time.monotonic()
    name = library_name(archs, project)
    for left_by_the_dead in cache.glob(f"{project.name}.build-*"):
        shutil.rmtree(left_by_the_dead, ignore_errors=True)
    prefix = f"{project.name}.build-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=cache, ignore_cleanup_errors=True) as folder:
        objects = _compile(archs, project, toolchain, Path(folder), say)
        library = _link(objects, project, toolchain["link"], Path(folder) / name)
        if name != library_name(archs, project):
            raise BuildError(f"the sources in {project.csrc} changed while they were compiled; build again")
        publish(library, cache / name)
    say.line(f"built {cache / name} in {time.monotonic() - start:.1f} s")
    return cache / name


def _compile(
    archs: Sequence[str], project: Project, toolchain: Mapping[str, Tool], folder: Path, say: "Progress"
) -> list[Path]:
    """All objects of the project; those that the cache lacks are compiled, and published as each one is ready."""
    sources = sorted(p.relative_to(project.csrc) for p in project.csrc.rglob("*") if p.suffix in (".cu", ".cpp"))
    if not sources:
        raise BuildError(f"there is no .cu or .cpp file in {project.csrc}")
    cached = {s: folder.parent / object_name(s, archs, project, toolchain[s.suffix]) for s in sources}
    steps = []
    for source, path in cached.items():
        if not is_intact(path):
            tool, output = toolchain[source.suffix], folder / path.name
            flags = _compile_flags(source, archs, project)
            command = (tool.executable, *flags, *tool.search, "-c", str(source), "-o", str(output))
            steps.append(Step(str(source), command, output))
    if steps:
        say.line(f"compiling {len(steps)} of {len(sources)} objects for {_sm(archs)}")
    failures = []
    for count, (step, succeeded, output) in enumerate(run_steps(steps, folder, project.csrc) if steps else (), 1):
        say.step(f"{count}/{len(steps)} {step.name}")
        source = Path(step.name)
        if not succeeded:
            failures.append(f"{output.rstrip()}\n(in {project.csrc}: {shlex.join(step.command)})")
        # An object of a source that was edited meanwhile would lie under the key of the old text.
        elif object_name(source, archs, project, toolchain[source.suffix]) == step.output.name:
            publish(step.output, cached[source])
            if output.strip():
                say.line(f"{step.name} compiled, with this output:\n{output.rstrip()}")
    if failures:
        raise BuildError(f"{len(failures)} of {len(sources)} sources did not compile:\n" + "\n\n".join(failures))
    return list(cached.values())
