"""Write a file or a whole folder so that a reader sees the old one or the new one, never a part of either.

The new content grows under a hidden name beside the target, is flushed to disk and then renamed over it.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from intrafusion.errors import FolderError


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the temporary name to write to; it becomes `path` when the block ends, and vanishes if the block raises.

    The temporary name keeps the suffix of `path`. Missing parent folders are made. A link is followed.

    Raises:
        FolderError: `path` is a folder.
    """
    target = Path(path).resolve()
    if target.is_dir():
        raise FolderError(f"{target}: expected the name of a file, but this is a folder; choose another name.")
    with _beside(target) as temporary:
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
        _flush(target.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty temporary folder to fill; it becomes `path` when the block ends, and vanishes if the block raises.

    An existing folder is replaced as a whole, but only an empty one or one of ours. Missing parent folders are made.
    A link is followed.

    Args:
        ours: whether an existing folder was written by this library, so that replacing it loses nothing else.
    Raises:
        FolderError: `path` is a file, or a folder that is neither empty nor ours.
    """
    target = Path(path).resolve()
    _refuse_foreign(target, ours)
    with _beside(target) as temporary:
        temporary.mkdir()
        yield temporary
        for written in temporary.rglob("*"):
            _flush(written)
        _flush(temporary)
        _refuse_foreign(target, ours)  # again: the block may have taken hours
        _swap(temporary, target)
        _flush(target.parent)


def _refuse_foreign(target: Path, ours: Callable[[Path], bool]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FolderError(f"{target}: expected the name of a folder, but this is a file; choose another name.")
    if any(target.iterdir()) and not ours(target):
        raise FolderError(
            f"{target}: this folder holds files that intrafusion did not write, and they would be lost; "
            "choose another name, or move them away."
        )


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A free hidden name in the folder of `target`; on an error it goes away, and so do the parents made for it."""
    made = [folder for folder in target.parents if not folder.exists()]
    temporary = target.parent / f".{secrets.token_hex(4)}.{target.name}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except BaseException:
        _remove(temporary)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def _swap(temporary: Path, target: Path) -> None:
    """Rename a folder over another one, which is first moved aside and put back if the rename fails."""
    if not target.exists():
        os.rename(temporary, target)
        return
    aside = temporary.with_name(temporary.name + ".old")
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(aside, target)
        raise
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Have the operating system write a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
