"""Builds csrc/ into one shared library: content-addressed, for many processes at once, of which any may be killed.

There is no build tree and no timestamp. The cache folder, $DSV4_CACHE or ~/.cache/dsv4_ops, holds

    <source>-<key>.o      an object; key: flags, compiler versions, contents of the source and of all that it includes
    dsv4_cuda-<key>.so    the library; key: contents of all of csrc, architectures, flags, processor
    <either>.sha256       its checksum, written last: without a matching one there is no artifact
    dsv4_cuda.lock        locked by the one process that builds; the text says who
    dsv4_cuda.build-*     what that process is compiling; if it dies, the next one to hold the lock removes it

The key of the library has no compiler version in it, so a library that was built ahead of time, by CI or on another
machine, is found where there is no compiler at all. The price: another g++ or nvcc alone does not rebuild it. The key
of an object has them, so that objects of two compilers are never linked into one library.
"""

import functools
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TextIO

import torch

from dsv4_ops.artifacts import Progress, cache_folder, file_hash, is_intact, locked, publish
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
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: FLAGS)
    toolchain: Callable[[], Mapping[str, Tool]] = find_toolchain


DSV4 = Project()


def build(archs: Sequence[str] | None = None, project: Project = DSV4, *, progress: TextIO | None = None) -> Path:
    """The library for `archs` (default: those of `detect_archs`), compiled if the cache folder has none.

    What it compiles, and whom it waits for, it says on `progress` (default: stderr).
    """
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


def _build(archs: Sequence[str], project: Project, toolchain: Mapping[str, Tool], cache: Path, say: Progress) -> Path:
    """Compile what the cache lacks, link, publish. The caller holds the lock."""
    start = time.monotonic()
    path = cache / library_name(archs, project)
    prefix = f"{project.name}.build-"
    for left_by_the_dead in cache.glob(f"{prefix}*"):
        shutil.rmtree(left_by_the_dead, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=cache, ignore_cleanup_errors=True) as folder:
        objects = _find_objects(archs, project, toolchain, cache)
        _require_unchanged(path.name, library_name(archs, project), project)
        missing = {source: object_ for source, object_ in objects.items() if not is_intact(object_)}
        if missing:
            say.line(f"compiling {len(missing)} of {len(objects)} objects for {_sm(archs)}")
            _compile(missing, archs, project, toolchain, Path(folder), say)
        made = Path(folder) / path.name
        _link(list(objects.values()), made, project.flags["link"], toolchain["link"])
        publish(made, path)
    say.line(f"built {path} in {time.monotonic() - start:.1f} s")
    return path


def _find_objects(
    archs: Sequence[str], project: Project, toolchain: Mapping[str, Tool], cache: Path
) -> dict[Path, Path]:
    """Each source, relative to csrc, and where its object is or will be."""
    files = (path for path in project.csrc.rglob("*") if path.suffix in (".cu", ".cpp"))
    sources = sorted(path.relative_to(project.csrc) for path in files)
    if not sources:
        raise BuildError(f"there is no .cu or .cpp file in {project.csrc}")
    return {source: cache / object_name(source, archs, project, toolchain[source.suffix]) for source in sources}


def _compile(
    missing: Mapping[Path, Path],
    archs: Sequence[str],
    project: Project,
    toolchain: Mapping[str, Tool],
    folder: Path,
    say: Progress,
) -> None:
    """Compile sources in `folder` and publish each object when it is ready, so that a killed build is not all lost."""
    steps = []
    for source, path in missing.items():
        tool, made = toolchain[source.suffix], folder / path.name
        options = (*_compile_flags(source, archs, project), *tool.search)
        steps.append(Step(str(source), (tool.executable, *options, "-c", str(source), "-o", str(made)), made))
    failures = []
    for count, (step, succeeded, output) in enumerate(run_steps(steps, folder, project.csrc), 1):
        say.step(f"{count}/{len(steps)} {step.name}")
        source = Path(step.name)
        if not succeeded:
            failures.append(f"{output.rstrip()}\n(in {project.csrc}: {shlex.join(step.command)})")
            continue
        name = object_name(source, archs, project, toolchain[source.suffix])
        _require_unchanged(missing[source].name, name, project)
        publish(step.output, missing[source])
        if output.strip():
            say.line(f"{step.name} compiles with a warning:\n{output.rstrip()}")
    if failures:
        raise BuildError(f"{len(failures)} of {len(steps)} sources did not compile:\n" + "\n\n".join(failures))


def _require_unchanged(before: str, after: str, project: Project) -> None:
    """What is made of a source that was edited meanwhile must not be published under the key of the old text."""
    if before != after:
        raise BuildError(f"the sources in {project.csrc} changed while they were compiled; build again")


def _link(objects: Sequence[Path], output: Path, flags: Sequence[str], tool: Tool) -> None:
    command = (tool.executable, *map(str, objects), "-o", str(output), *tool.search, *flags)
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    log = (result.stdout + result.stderr).splitlines()
    ours = [line for line in log if re.search(r"undefined .*\bdsv4::", line)]
    if result.returncode or ours:
        message = "\n".join(log if result.returncode else ours)
        raise BuildError(f"{output.name} cannot be linked:\n{message}\n({shlex.join(command)})")


def _compile_flags(source: Path, archs: Sequence[str], project: Project) -> tuple[str, ...]:
    return (*project.flags[source.suffix], *(arch_flags(archs) if source.suffix == ".cu" else ()))


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _sm(archs: Sequence[str]) -> str:
    return " and ".join(f"sm_{arch}" for arch in archs)
