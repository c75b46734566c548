"""The cache folder: artifacts that are complete or do not count, and the lock of the one process that makes them.

A lock file that outlives its owner blocks nobody: the lock is the kernel's `flock`, freed when its holder dies, and the
text in the file only says who that is.
"""

import contextlib
import fcntl
import hashlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TextIO


class Progress:
    """Lines on stderr, or on `stream`; on a terminal also one that is overwritten."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = sys.stderr if stream is None else stream
        self.clear = "\r\x1b[K" if self.stream.isatty() else ""

    def line(self, text: str) -> None:
        """Print a line that stays."""
        print(f"{self.clear}dsv4_ops: {text}", file=self.stream, flush=True)

    def step(self, text: str) -> None:
        """Show a line until the next one, on a terminal."""
        if self.clear:
            print(f"{self.clear}dsv4_ops: {text}", end="", file=self.stream, flush=True)


def cache_folder() -> Path:
    """$DSV4_CACHE, or ~/.cache/dsv4_ops."""
    return Path(os.environ.get("DSV4_CACHE") or "~/.cache/dsv4_ops").expanduser().absolute()


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
def locked(path: Path, task: str, say: Progress) -> Iterator[None]:
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
        finally:
            file.truncate(0)
            # Closing is not enough: a child that another thread forked meanwhile has the same open file.
            fcntl.flock(file, fcntl.LOCK_UN)


def _acquire(file: IO, path: Path, say: Progress) -> None:
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


def _checksum(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
