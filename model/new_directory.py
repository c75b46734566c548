"""A directory that appears under its name complete or not at all."""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.errors import UserError

MARK = ".incomplete-"


@contextmanager
def new_directory(target: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `target`; it gets the name on success and is removed on an exception.

    A killed process leaves `.NAME.incomplete-*` behind, never `target`; the next call for the same target removes it. A
    process holds a lock on what it is writing, and the lock ends with the process.
    """
    target = Path(os.path.abspath(target))
    _require_free(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(target)
        work, lock = _make_locked(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}") from None
    try:
        yield work
        _require_free(target)
        for path in work.iterdir():
            path.chmod(default_mode())
        for path in (*work.iterdir(), work):  # else the rename could reach the disk before the contents
            _sync(path)
        os.rename(work, target)  # replaces an empty directory, fails on any other
        _sync(target.parent)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {target}: {error}") from error
        raise
    finally:
        os.close(lock)


def default_mode() -> int:
    """Permissions of a new file; safetensors makes its files readable by the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def remove_stale(target: Path) -> None:
    """Remove what killed processes left of earlier attempts to make `target`."""
    for path in target.parent.glob(f".{target.name}{MARK}*"):
        lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            raise UserError(f"{target} is being written by another process ({path})") from None
        finally:
            os.close(lock)


def _require_free(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty directory; choose another name or remove it")


def _make_locked(target: Path) -> tuple[Path, int]:
    while True:
        work = target.parent / f".{target.name}{MARK}{secrets.token_hex(4)}"
        work.mkdir()
        lock = os.open(work, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if work.exists():  # else another process took the unlocked directory for a stale one
            return work, lock
        os.close(lock)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
