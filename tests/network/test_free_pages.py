"""Large tensors get memory of their own from the system where that is asked for, and as usual afterwards."""

from __future__ import annotations

import ctypes
import platform

import pytest
import torch

from intrafusion.network.free_pages import returning_large_pages

_SIZE, _PIECES = 24 * 2**20, 4  # each less than what always gets memory of its own; more than a thread has free


class _Told(ctypes.Structure):
    _fields_ = [("counts", ctypes.c_size_t * 10)]


def _count_own() -> int:
    """Bytes of what has memory of its own: hblkhd of mallinfo2."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _Told
    return ask().counts[4]


def _find_rise() -> tuple[int, int]:
    """By how much that rises with some large tensors, and without them again."""
    before = _count_own()
    tensors = [torch.empty(_SIZE, dtype=torch.uint8) for _ in range(_PIECES)]
    made = _count_own() - before
    del tensors
    return made, _count_own() - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator, which is not asked")
def test_large_tensors_go_back_to_the_system_inside_and_not_after() -> None:
    with returning_large_pages():
        made, kept = _find_rise()
    assert made >= _SIZE
    assert kept == 0
    assert _find_rise() == (0, 0)
