"""Memory that was freed, given back to the system."""

from __future__ import annotations

import contextlib
import ctypes


def return_free_pages() -> None:
    """Have the allocator of C return what it holds free, where it can (glibc): it keeps some for every thread."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no such allocator
        ctypes.CDLL(None).malloc_trim(0)
