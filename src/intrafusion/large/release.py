"""Memory given back to the system between steps: what one block took must not stay beside what the next one takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc


def release_memory() -> None:
    """Collect what is only held in circles, and have the allocator return its free pages where it can (glibc)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no such allocator
        ctypes.CDLL(None).malloc_trim(0)
