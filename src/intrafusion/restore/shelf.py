"""Memory that is not needed for the moment: kept within a bound, and what exceeds it in a file."""

from __future__ import annotations

import bisect
import ctypes
import errno
import os
import tempfile
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import IO

import torch

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError

_MOST = 2**27  # bytes: a bound by default, so that what is taken does not grow with the images
_SHARE = 8  # of what the machine has, an eighth at most
_LEAST = 8  # of the bound, an eighth at least, whatever the images take of it


def find_bound(kept: int = 0) -> int:
    """Bytes that the shelf may hold where nobody says how many: 128 MiB, or less on a small machine.

    Args:
        kept: bytes of that, which the images themselves take.
    """
    try:
        bound = min(_MOST, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _SHARE)
    except (AttributeError, ValueError, OSError):  # not known here
        bound = _MOST
    return max(bound - kept, bound // _LEAST)


@dataclass(eq=False)
class _Item:
    """Storages that lie together, and where their bytes are if they were emptied."""

    storages: Sequence[torch.UntypedStorage]
    due: float
    sizes: list[int]
    away: list[int | torch.Tensor] | None = None

    __repr__ = show_briefly

    @property
    def size(self) -> int:
        return sum(self.sizes)


class Shelf:
    """Holds the memory of tensors until it is taken back; what is due last goes into a file where it is too much.

    Tensors whose memory was put away are there as before, but must not be touched. Tensors of another device go to the
    memory of the CPU. The file has no name, lies where `tempfile` puts it, and is gone with the process.

    Args:
        memory: bytes that stay where they are.
    """

    def __init__(self, memory: int) -> None:
        self.memory, self.file = memory, _File()
        self.items: dict[Hashable, _Item] = {}
        self.emptied: dict[int, Hashable] = {}  # storages, and the item that each is part of
        self.held = 0

    def lay(self, key: Hashable, storages: Sequence[torch.UntypedStorage], due: float) -> None:
        """Leave these here until they are taken; nothing may lie under this key.

        Args:
            due: larger for what is needed later.
        Raises:
            ModelError: the disk is full.
        """
        item = self.items[key] = _Item(storages, due, [s.nbytes() for s in storages])
        self.held += item.size
        if self.held <= self.memory:
            return
        inside = sorted((k for k, i in self.items.items() if i.away is None), key=lambda k: self.items[k].due)
        while self.held > self.memory and inside:
            self._put_away(self.items[inside[-1]], inside.pop())

    def take(self, key: Hashable) -> None:
        """Have these as they were, if they are here."""
        if key in self.items:
            self._fetch(self.items[key])
            self.held -= self.items.pop(key).size

    def rename(self, key: Hashable, new: Hashable) -> None:
        """What lies there, under another key."""
        item = self.items[new] = self.items.pop(key)
        if item.away is not None:
            self.emptied.update((storage._cdata, new) for storage in item.storages)

    def drop(self, key: Hashable) -> None:
        """These are not needed any more."""
        item = self.items.pop(key)
        if item.away is None:
            self.held -= item.size
            return
        for storage, size, where in zip(item.storages, item.sizes, item.away, strict=False):  # fewer after an interrupt
            self.emptied.pop(storage._cdata, None)
            if isinstance(where, int):
                self.file.free(where, size)

    def ensure(self, storages: Sequence[torch.UntypedStorage]) -> None:
        """Have these in their place, also where they lie with others under a key."""
        for storage in storages if self.emptied else ():
            if storage._cdata in self.emptied:
                self._fetch(self.items[self.emptied[storage._cdata]])

    def close(self) -> None:
        """What others than the shelf still hold is put back; of the rest, and the file, nothing is left."""
        for key in list(self.items):
            self.release(key)
        self.file.close()

    def release(self, key: Hashable) -> None:
        """Have these as they were if others hold them, else nothing of them."""
        if any(torch._C._storage_Use_Count(s._cdata) > 1 for s in self.items[key].storages):
            self.take(key)
        else:
            self.drop(key)

    def _put_away(self, item: _Item, key: Hashable) -> None:
        item.away = []
        for storage in item.storages:
            on_cpu = storage.device.type == "cpu"
            item.away.append(self.file.write(storage) if on_cpu else _see_bytes(storage).cpu())
            storage.resize_(0)
            self.emptied[storage._cdata] = key
        self.held -= item.size

    def _fetch(self, item: _Item) -> None:
        if item.away is None:
            return
        for storage, size, where in zip(item.storages, item.sizes, item.away, strict=False):
            storage.resize_(size)
            if isinstance(where, int):
                self.file.read_(storage, where)
            else:
                _see_bytes(storage).copy_(where)
            self.emptied.pop(storage._cdata, None)
        item.away = None
        self.held += item.size


def _see_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


@dataclass(eq=False)
class _File:
    """A file without a name, in whose free parts the bytes of storages are written.

    Plain writes and reads: of a mapped file, what was touched counts as memory of the process.

    Attributes:
        gaps: (start, stop) of what is free before the end, in order.
    """

    gaps: list[tuple[int, int]] = field(default_factory=list)
    end: int = 0
    handle: IO[bytes] | None = None

    __repr__ = show_briefly

    def write(self, storage: torch.UntypedStorage) -> int:
        """Where the bytes begin."""
        size = storage.nbytes()
        start = self._claim(size)
        try:
            self.handle = self.handle or tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
            _move(os.pwrite, self.handle.fileno(), storage, start)
        except OSError as error:
            raise ModelError(
                f"solving layers: {self.end / 2**20:,.0f} MB of activations do not fit beside those in memory into a "
                f"temporary file in {tempfile.gettempdir()}: {error.strerror or error}; set TMPDIR to a folder with "
                "room for several times that, raise memory=, or give fewer images."
            ) from error
        return start

    def read_(self, storage: torch.UntypedStorage, start: int) -> None:
        """Fill a storage, and free its part."""
        assert self.handle is not None
        _move(lambda fd, part, at: os.preadv(fd, [part], at), self.handle.fileno(), storage, start)
        self.free(start, storage.nbytes())

    def free(self, start: int, size: int) -> None:
        index = bisect.bisect(self.gaps, (start, start))
        self.gaps.insert(index, (start, start + size))
        for i in (index, index - 1):  # joined with the next and with the one before
            if 0 <= i < len(self.gaps) - 1 and self.gaps[i][1] == self.gaps[i + 1][0]:
                self.gaps[i : i + 2] = [(self.gaps[i][0], self.gaps[i + 1][1])]

    def close(self) -> None:
        if self.handle is not None:
            self.handle.close()

    def _claim(self, size: int) -> int:
        for index, (start, stop) in enumerate(self.gaps):
            if stop - start >= size:
                self.gaps[index : index + 1] = [(start + size, stop)] if stop - start > size else []
                return start
        start, self.end = self.end, self.end + size
        return start


def _move(
    transfer: Callable[[int, ctypes.Array[ctypes.c_char], int], int],
    descriptor: int,
    storage: torch.UntypedStorage,
    start: int,
) -> None:
    """All bytes of a storage to or from a place of a file, which takes or gives a part at a time."""
    done, size = 0, storage.nbytes()
    while done < size:
        part = (ctypes.c_char * (size - done)).from_address(storage.data_ptr() + done)
        moved = transfer(descriptor, part, start + done)
        if not moved:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += moved
