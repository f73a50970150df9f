"""How much memory calibration may take: as it was said, or a share of what is free."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any

import torch

from intrafusion.arguments import Such, plain
from intrafusion.errors import RecipeError, show

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SAID = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(|[kmgt]i?)b?\s*", re.IGNORECASE)
_EXPECTED = "bytes, at least one, such as 2GB, 500MB or 1000000000"
_SHARE = 2  # of what is free, one part in so many
_UNKNOWN = 2**32  # bytes that are taken to be free where the system does not tell
_MEMINFO = Path("/proc/meminfo")
_LIMITS = (  # of the group of processes that this one is in: the most that it may take, and what it takes
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def read_memory(said: MemoryLike) -> int | None:
    """Bytes of a number or a text; None where nothing was said.

    >>> read_memory("2GB"), read_memory("1.5 MiB"), read_memory(10**6), read_memory(None)
    (2000000000, 1572864, 1000000, None)

    Raises:
        RecipeError: something else, or nothing that is left of it.
    """
    if said is None:
        return None
    found = _SAID.fullmatch(said) if isinstance(said, str) else None
    count: Any = plain(said)
    if found is not None:
        count = math.floor(float(found[1]) * _UNITS[found[2].lower()])
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count < 2**63:
        raise RecipeError(f"memory: expected {_EXPECTED}, got {show(said)}.")
    return count


def _is_memory(said: Any) -> bool:
    try:
        return read_memory(said) is not None
    except RecipeError:
        return False


MemoryLike = Annotated[int | str, Such(_EXPECTED, _is_memory)] | None
"""Bytes, or text such as "2GB"; None: half of what is free."""


def choose_memory(said: int | None) -> int:
    """Bytes that may be taken: what was said, or half of what is free."""
    return said if said is not None else find_free_memory(torch.device("cpu")) // _SHARE


def find_free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, now, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([_find_available(), *(found for pair in _LIMITS if (found := _find_left(*pair)) is not None)])


def _find_available() -> int:
    """Of the machine: what is free, or would be once caches are dropped."""
    try:
        kilobytes = re.search(r"^MemAvailable:\s*(\d+) kB", _MEMINFO.read_text(), re.MULTILINE)
        if kilobytes is not None:
            return int(kilobytes[1]) * 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (OSError, ValueError, AttributeError):  # not Linux, or not even POSIX
        return _UNKNOWN


def _find_left(limit: str, used: str) -> int | None:
    """What a limit leaves; None where there is none."""
    try:
        return max(0, int(Path(limit).read_text()) - int(Path(used).read_text()))
    except (OSError, ValueError):  # there is no such file, or it says "max"
        return None


def describe_bytes(count: int) -> str:
    """
    >>> describe_bytes(1_234_567), describe_bytes(980)
    ('1.23 MB', '980 bytes')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} bytes"
