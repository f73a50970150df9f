"""A hidden folder beside a file or folder that is being written, and what becomes of it when its writer is killed.

Its name begins with a mark of the target, so that the next call on the same target finds it. Its writer holds a lock on
it, which the system drops at a kill: what can be locked is left over. In it lie the new file or folder, "new" while it
is written, and after the exchange the folder that stood at the target before: at "aside", or under the number of the
new one, which is not its own.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from intrafusion.errors import FolderError
from intrafusion.io.locks import is_open_at, lock, try_lock, wait_for_lock

NEW, ASIDE = "new", "aside"
Owns = Callable[[Path], bool]
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


def owns_nothing(path: Path) -> bool:
    return False


@contextmanager
def workspace(target: Path, ours: Owns = owns_nothing) -> Iterator[Path]:
    """An empty folder of our own beside the target; parents that are made for it go away again on an error.

    Args:
        ours: what in the folder at the target a newer one replaces; all else is the user's, and stays.
    """
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        if any(folder.is_file() for folder in target.parents):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        settle(target, ours)
        with _begin(target) as place:
            try:
                yield place
            finally:
                with lock(target.parent):
                    _finish(place, target, ours)
    except BaseException:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def settle(target: Path, ours: Owns = owns_nothing) -> None:
    """Clean up after calls that were killed: the target has its name again, and nothing else is left."""
    left = sorted(target.parent.glob(f"{_mark(target)}*"))
    if left:
        with lock(target.parent):
            for place in left:
                with _taken_over(place) as is_left_over:
                    if is_left_over:
                        _finish(place, target, ours)


def carry(source: Path, target: Path, ours: Owns = owns_nothing) -> None:
    """Give a folder the user's files of another one, as further names of the same files where that is possible.

    Raises:
        FolderError: another file system is mounted in the folder.
    """
    for entry in os.scandir(source):
        goal = target / entry.name
        if ours(Path(entry.path)):
            continue
        if entry.is_dir(follow_symlinks=False):
            goal.mkdir(exist_ok=True)
            carry(Path(entry.path), goal)
            shutil.copystat(entry.path, goal)
        elif not os.path.lexists(goal):
            _link(Path(entry.path), goal)
        elif entry.stat(follow_symlinks=False).st_mtime_ns > goal.lstat().st_mtime_ns:
            goal.unlink()  # the user wrote it anew between the two times that his files are carried over
            _link(Path(entry.path), goal)


def _link(source: Path, goal: Path) -> None:
    try:
        os.link(source, goal, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise FolderError(
                f"{source}: lies on another file system than the folder that is to be replaced; "
                "choose another name for the new one."
            ) from error
        if error.errno not in _NO_LINKS:
            raise
        shutil.copy2(source, goal, follow_symlinks=False)


def _mark(target: Path) -> str:
    return f".intrafusion-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}-"


@contextmanager
def _begin(target: Path) -> Iterator[Path]:
    """A new workspace, locked."""
    place, descriptor = _make_locked(target)
    try:
        yield place
    finally:
        os.close(descriptor)


def _make_locked(target: Path) -> tuple[Path, int]:
    """A new workspace and what keeps it locked; one that was taken for a left-over in between is made again."""
    while True:
        place = target.parent / f"{_mark(target)}{secrets.token_hex(4)}"
        place.mkdir(mode=0o700)
        with suppress(FileNotFoundError):
            descriptor = os.open(place, os.O_RDONLY)
            wait_for_lock(descriptor)
            if is_open_at(descriptor, place):
                return place, descriptor
            os.close(descriptor)


@contextmanager
def _taken_over(place: Path) -> Iterator[bool]:
    """Whether nobody works in a workspace any more; if so, it is locked for us."""
    try:
        descriptor = os.open(place, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        yield try_lock(descriptor) and is_open_at(descriptor, place)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS):
            raise
        yield False
    finally:
        os.close(descriptor)


def _finish(place: Path, target: Path, ours: Owns) -> None:
    """Remove a workspace; the folder that was replaced first gives back the name, or what the user put into it."""
    for folder in place.iterdir():
        if folder.name == ASIDE and not target.exists():
            os.rename(folder, target)
        elif folder.is_dir() and folder.name not in (NEW, str(folder.stat().st_ino)):
            carry(folder, target, ours)
    shutil.rmtree(place)
