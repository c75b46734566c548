"""Several processes that build at once, and processes that are killed while they build."""

import multiprocessing
import os
import re
import signal
import socket
import time

import pytest

from dsv4_ops.artifacts import Progress, is_intact, locked
from dsv4_ops.build import build, find_library
from graph_tests.build.tiny_project import ALL, text_of, wait_until

FORK = multiprocessing.get_context("fork")


class Builder:
    """A process that builds `tiny`, and what it has printed."""

    def __init__(self, tiny, name):
        self.log = tiny.folder / f"{name}.log"
        self.process = FORK.Process(target=self._run, args=(tiny.project,))
        self.process.start()
        self.pid = self.process.pid

    def _run(self, project):
        with open(self.log, "w") as progress:
            build(["90a"], project, progress=progress)

    @property
    def printed(self):
        return text_of(self.log)

    def join(self):
        self.process.join(20)
        return self.process.exitcode

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        assert self.join() == -signal.SIGKILL


@pytest.fixture
def start(tiny):
    """Start builders; those still alive at the end of the test are killed."""
    builders = []

    def start(name):
        builders.append(Builder(tiny, name))
        return builders[-1]

    yield start
    for builder in builders:
        if builder.process.is_alive():
            builder.kill()


def objects(cache):
    return [path for path in cache.glob("*.o") if is_intact(path)]


def work_folders(cache):
    return list(cache.glob("tiny.build-*"))


def test_two_processes_build_once_and_both_get_the_library(tiny, start):
    tiny.hold("sample/sample.cpp")
    first = start("first")
    wait_until(lambda: "compiling" in first.printed, "the first process compiles")
    second = start("second")
    wait_until(lambda: "waiting" in second.printed, "the second process waits")
    tiny.release()
    assert (first.join(), second.join()) == (0, 0)
    assert tiny.compiled() == ["link", *ALL]
    owner = f"pid {first.pid} on {re.escape(socket.gethostname())}, building tiny for sm_90a"
    assert re.fullmatch(rf"dsv4_ops: waiting for {owner} since [-0-9]+ [:0-9]+ \(.*tiny\.lock\)\n", second.printed)


def test_processes_that_start_together_build_once(tiny, start):
    builders = [start(f"builder {index}") for index in range(4)]
    assert [builder.join() for builder in builders] == [0] * 4
    assert tiny.compiled() == ["link", *ALL]
    assert sum("built" in builder.printed for builder in builders) == 1


def test_waiter_goes_on_when_the_builder_is_killed(tiny, start):
    """A lock file that outlives its owner makes torch's extension loader wait for ever.

    The compilers of the killed process live on here until `release`: they must not hold the lock either.
    """
    tiny.hold("sample/sample.cpp")
    first = start("first")
    wait_until(lambda: "compiling" in first.printed, "the first process compiles")
    second = start("second")
    wait_until(lambda: f"waiting for pid {first.pid} " in second.printed, "the second process names the first")
    first.kill()
    wait_until(lambda: "compiling" in second.printed, "the second process compiles", seconds=5)
    tiny.release()
    assert second.join() == 0
    assert find_library(["90a"], tiny.project)


def test_killed_in_the_middle_of_a_compile(tiny, cache, start):
    """Finished objects stay, nothing is there by half, and the next build compiles the rest and tidies up."""
    tiny.hold("sample/sample.cpp")
    builder = start("builder")
    wait_until(lambda: len(objects(cache)) == 2, "two of three objects are published")
    wait_until(lambda: tiny.folder.joinpath("compiled").read_text().count("\n") == 3, "the third compile runs")
    builder.kill()
    left = sorted(path.name.split("-")[0] for path in cache.iterdir() if path.is_file())
    assert left == [*["norm_norm"] * 2, *["quant_quant"] * 2, "tiny.lock"]
    assert len(objects(cache)) == 2 and len(work_folders(cache)) == 1
    tiny.release()
    tiny.compiled()
    library, printed = tiny.build()
    assert "compiling 1 of 3 objects" in printed and "waiting" not in printed
    assert tiny.compiled() == ["link", "sample/sample.cpp"]
    assert is_intact(library) and work_folders(cache) == []


def test_lock_file_that_nobody_holds_blocks_nobody(tiny, cache):
    cache.mkdir()
    (cache / "tiny.lock").write_text("pid 999999 on a machine that is gone, building tiny since 1970-01-01 00:00:00\n")
    library, printed = tiny.build()
    assert is_intact(library) and "waiting" not in printed
    assert (cache / "tiny.lock").read_text() == ""


def test_child_forked_while_the_lock_was_held_does_not_keep_it(tmp_path):
    """A data loader, say, that another thread forks during the build."""
    path = tmp_path / "lock"
    with locked(path, "tiny", Progress()):
        child = FORK.Process(target=time.sleep, args=(10,))
        child.start()
    try:
        start = time.monotonic()
        with locked(path, "tiny", Progress()):
            assert time.monotonic() - start < 5
    finally:
        child.kill()
        child.join()
