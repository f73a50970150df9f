"""Write a file or a whole folder so that a reader sees the old one or the new one, never a part of either.

The new content grows in a hidden folder beside the target, is flushed to disk and then takes its name. What a killed
call left there is cleaned up by the next one on the same target.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from intrafusion.errors import FolderError
from intrafusion.io.exchange import exchange
from intrafusion.io.locks import is_open_at, lock
from intrafusion.io.workspace import ASIDE, NEW, Owns, carry, owns_nothing, settle, workspace

T = TypeVar("T")

_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on the size of files",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EBUSY: "choose a folder inside it, a mounted one cannot be replaced",
}
_TRIES = 20


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the temporary name to write to; it becomes `path` when the block ends, and vanishes if the block raises.

    The temporary file has the name of `path`, in another folder. Missing parent folders are made. A link is followed.

    Raises:
        FolderError: `path` is a folder, or cannot be written: no space, no permission, too long a name.
    """
    with report_unwritable(path):
        target = _resolve(path)
        if target.is_dir():
            raise FolderError(f"{target}: expected the name of a file, but this is a folder; choose another name.")
        with workspace(target) as place:
            temporary = place / target.name
            yield temporary
            _open_to_readers(temporary)
            _flush(temporary)
            os.replace(temporary, target)
            _flush(target.parent)


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str],
    *,
    ours: Callable[[Path], bool],
    names: Collection[str],
    yours: Callable[[Path], bool] = owns_nothing,
) -> Iterator[Path]:
    """Yield an empty temporary folder to fill; it becomes `path` when the block ends, and vanishes if the block raises.

    An existing folder is replaced, but only an empty one or one of ours; what the user put into it stays there. Missing
    parent folders are made. A link is followed. Of several that write the same folder the last one stays.

    Args:
        ours: whether an existing folder was written by this library.
        names: what this library writes into such a folder: of these the new folder has what was written now.
        yours: whether a file of such a name is the user's after all.
    Raises:
        FolderError: `path` is a file, or a folder that is neither empty nor ours, or cannot be written.
    """
    with report_unwritable(path):
        target = _resolve(path)
        _refuse_foreign(target, ours)
        replaced: Owns = lambda file: file.name in names and not yours(file)  # noqa: E731
        with workspace(target, replaced) as place:
            new = place / NEW
            new.mkdir()
            yield new
            for written in list(new.rglob("*")):
                _open_to_readers(written)
                _flush(written)
            with lock(target.parent):
                _refuse_foreign(target, ours)  # again: the block may have taken hours
                _put_in_place(new, target, replaced)


def read_whole(folder: Path, read: Callable[[Path], T]) -> T:
    """What `read` makes of the files of a folder, all of one state of it, also while others replace it.

    A folder that a killed call moved aside gets its name back first.
    """
    with report_unreadable(folder):
        place = _resolve(folder)
        for _ in range(_TRIES):
            if not place.exists() and place.parent.is_dir():
                settle(place)
            if not place.is_dir():
                return read(folder)  # which says what is there
            found = _read_if_it_stays(place, lambda: read(folder))
            if found is not None:
                return found[0]
        with lock(place.parent):  # those who write it wait
            return read(folder)


def _read_if_it_stays(folder: Path, read: Callable[[], T]) -> tuple[T] | None:
    """What was read, or None if another folder came in its place meanwhile; an error counts only if none did."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        found = read()
        return (found,) if is_open_at(descriptor, folder) else None
    except (FolderError, OSError):
        if is_open_at(descriptor, folder):
            raise
        return None
    finally:
        os.close(descriptor)


@contextmanager
def report_unwritable(path: str | os.PathLike[str]) -> Iterator[None]:
    """What the system says against writing, as an error of the library."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = next((n for n in _REMEDIES if n == getattr(error, "errno", None) or os.strerror(n) in str(error)), 0)
        remedy = _REMEDIES.get(number, "check the place, or choose another one")
        raise FolderError(
            f"{_shorten(path)}: cannot be written ({getattr(error, 'strerror', None) or error}); "
            f"nothing there is half-written. To mend it, {remedy}."
        ) from error


@contextmanager
def report_unreadable(path: str | os.PathLike[str]) -> Iterator[None]:
    """What the system says against reading, as an error of the library."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise FolderError(f"{_shorten(path)}: cannot be read ({why}); check its name and permissions.") from error


def read_text(path: Path) -> str:
    """The text of a file; bytes that are no UTF-8 become characters that no format allows.

    Raises:
        FolderError: it cannot be read.
    """
    with report_unreadable(path):
        return path.read_text(encoding="utf-8", errors="surrogateescape")


def _shorten(path: str | os.PathLike[str]) -> str:
    text = os.fsdecode(path)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _resolve(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).resolve()
    except (ValueError, RuntimeError) as error:  # a null character; links that lead in a circle
        raise FolderError(
            f"{_shorten(path)!r}: is no name of a file or folder ({error}); choose another one."
        ) from error


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


def _put_in_place(new: Path, target: Path, replaced: Owns) -> None:
    """The exchange leaves the old folder in the workspace, which looks once more for what is the user's in it."""
    numbered = new.rename(new.with_name(str(new.stat().st_ino)))
    if target.exists():
        shutil.copymode(target, numbered)
        carry(target, numbered, replaced)
    for folder in (numbered, *(p for p in numbered.rglob("*") if p.is_dir())):
        _flush(folder)
    if target.exists():
        exchange(numbered, target, numbered.with_name(ASIDE))
    else:
        os.rename(numbered, target)
    _flush(target.parent)


def _open_to_readers(path: Path) -> None:
    """Give a file the permissions of any new one: some writers make their files for their user alone."""
    if path.is_file():
        probe = path.with_name(f"{NEW}-mode")
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666))
        shutil.copymode(probe, path)
        probe.unlink()


def _flush(path: Path) -> None:
    """Have the operating system write a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
