"""Two folders change places: in one step where the system can."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of <fcntl.h> and <linux/fs.h>
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


def exchange(new: Path, target: Path, aside: Path) -> None:
    """Put a folder in the place of another one, which then lies where the new one was, or at `aside`.

    Linux exchanges the names in one step (`renameat2`, on nearly all of its file systems). Elsewhere the old folder is
    moved aside first, and for a moment there is none; who finds it there must put it back, see `workspace.settle`.
    """
    if not _exchange_at_once(new, target):
        os.rename(target, aside)
        os.rename(new, target)


def _exchange_at_once(a: Path, b: Path) -> bool:
    """Whether the system could."""
    rename = _find_renameat2()
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(b))


@cache
def _find_renameat2() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function
