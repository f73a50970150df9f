"""Claims: several sweeps on one file of records, in any number of processes, share the work.

Each keeps a hidden file of its own beside the records, with a line for every setting that it has claimed, and a lock on
it for as long as it lives. The operating system drops the lock of a sweep that is killed: its claims count no more, and
whoever sees that first removes them, the next sweep at the latest. Claims are made one after another, under a lock on
the records.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from intrafusion.io.atomic import report_unreadable, report_unwritable
from intrafusion.io.locks import is_open_at, lock, try_lock, wait_for_lock
from intrafusion.lab.bench.records import parse_lines

_PAUSE_S = 0.2


class Claims:
    """What one sweep has claimed, and what it knows to be measured.

    Attributes:
        finished: keys of the records in the file, as of the last look.
    """

    def __init__(self, path: Path, own: Path) -> None:
        self._path, self._own, self._offset = path, own, 0
        self._held: set[str] = set()
        self.finished: set[str] = set()

    def claim(self, wanted: Iterable[str]) -> str | None:
        """The first of these keys that is neither measured nor claimed; from now on it is claimed."""
        with report_unwritable(self._path), lock(self._path):
            self.look()
            taken = self.finished | self._held | self._find_others()
            free = next((key for key in wanted if key not in taken), None)
            if free is not None:
                self._held.add(free)
                self._note()
        return free

    def release(self, key: str, *, measured: bool) -> None:
        """Give up a claim: it is measured and recorded, or failed."""
        self.finished |= {key} if measured else set()
        with report_unwritable(self._path), lock(self._path):
            self._held.discard(key)
            self._note()

    def clear(self) -> None:
        """Remove the claims of dead sweeps, also where nothing is left to claim."""
        with report_unwritable(self._path), lock(self._path):
            self._find_others()

    def wait(self) -> None:
        """Let others work for a moment, if they have claims, then look what they did."""
        with report_unwritable(self._path):
            with lock(self._path):
                busy = self._find_others()
            if busy:
                time.sleep(_PAUSE_S)
            self.look()

    def look(self) -> None:
        """Read what was added to the records since the last time, whole lines only."""
        with report_unreadable(self._path), self._path.open("rb") as file:
            file.seek(self._offset)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._offset += len(whole)
        self.finished |= {record.key for record in parse_lines(whole)}

    def _note(self) -> None:
        self._own.write_text("".join(json.dumps(key) + "\n" for key in sorted(self._held)))

    def _find_others(self) -> set[str]:
        """What sweeps that live have claimed; the claims of dead ones are removed."""
        found: set[str] = set()
        for other in self._path.parent.glob(f"{_prefix(self._path)}*"):
            if other != self._own:
                with suppress(FileNotFoundError):
                    found |= _read_living(other)
        return found


@contextmanager
def claims(path: Path) -> Iterator[Claims]:
    """The claims of one sweep, which end with the block; the file of records is made if there is none.

    Raises:
        FolderError: the file, or one beside it, cannot be written.
    """
    with report_unwritable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        own, descriptor = _begin(path.resolve())
    try:
        found = Claims(path.resolve(), own)
        found.clear()
        yield found
    finally:
        own.unlink(missing_ok=True)
        os.close(descriptor)


def _prefix(path: Path) -> str:
    return f".claims-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}-"


def _begin(path: Path) -> tuple[Path, int]:
    """A file of claims and what keeps it locked; one that was taken for a dead sweep's in between is made again."""
    while True:
        own = path.with_name(_prefix(path) + secrets.token_hex(4))
        descriptor = os.open(own, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        wait_for_lock(descriptor)
        if is_open_at(descriptor, own):
            return own, descriptor
        os.close(descriptor)


def _read_living(other: Path) -> set[str]:
    """The claims of another sweep, if it lives; where a file system has no locks nobody can tell, and none counts."""
    descriptor = os.open(other, os.O_RDONLY)
    try:
        if try_lock(descriptor):
            other.unlink()
            return set()
        return {json.loads(line) for line in other.read_text().splitlines()}
    except FileNotFoundError:
        raise
    except OSError:
        return set()
    finally:
        os.close(descriptor)
