"""Advisory locks on files and folders; the operating system lets go of them when their holder dies."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from intrafusion.errors import FolderError

_PATIENCE_S = 60.0
_PAUSE_S = 0.005


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Be the only holder of a lock on a file or folder, which exists. Where there are no locks it goes on without.

    Raises:
        FolderError: another one, perhaps stopped, kept it for more than a minute.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            _wait_for(descriptor, path)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for a child that was forked meanwhile and has it open
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Whether the lock of an open file or folder could be had; closing the file gives it back.

    Raises:
        OSError: this file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def wait_for_lock(descriptor: int) -> None:
    """Take the lock of an open file or folder until that is closed, if this file system has locks."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def is_open_at(descriptor: int, path: Path) -> bool:
    """Whether the name still leads to what was opened; as long as that is open, no other gets its number."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _wait_for(descriptor: int, path: Path) -> None:
    end = time.monotonic() + _PATIENCE_S
    while not try_lock(descriptor):
        if time.monotonic() > end:
            raise FolderError(
                f"{path}: another process has been writing here for more than {_PATIENCE_S:g} s, or was stopped while "
                "it did; wait for it or end it, then try again."
            )
        time.sleep(_PAUSE_S)
