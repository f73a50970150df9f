"""Memory that was freed, given back to the system."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

_KEEP_UP_TO, _MAP_FROM = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of the C library's mallopt
_LARGE = 2**20  # bytes
_LARGEST = 2**25  # to which that threshold grows by itself, as large tensors are freed, and the other to twice as much


def return_free_pages() -> None:
    """Have the allocator of C return what it holds free, where it can (glibc): it keeps some for every thread."""
    _ask_allocator("malloc_trim", 0)


@contextlib.contextmanager
def returning_large_pages() -> Iterator[None]:
    """Inside, tensors of 1 MiB or more go back to the system when they are freed, where the allocator can do that.

    Else each thread keeps some of what it freed for itself, also from `return_free_pages`. Afterwards, the allocator
    does what it comes to do by itself in a process that frees large tensors.
    """
    _ask_allocator("mallopt", _MAP_FROM, _LARGE)
    try:
        yield
    finally:
        _ask_allocator("mallopt", _MAP_FROM, _LARGEST)
        _ask_allocator("mallopt", _KEEP_UP_TO, 2 * _LARGEST)


def _ask_allocator(function: str, *what: int) -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no such allocator
        getattr(ctypes.CDLL(None), function)(*what)
