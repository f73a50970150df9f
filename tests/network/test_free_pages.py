"""Large tensors get memory of their own from the system where that is asked for, and as usual afterwards."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# In a process of its own: what tests before this one have freed may hold such tensors, without memory of their own.
_CODE = """
import ctypes
import torch
from intrafusion.network.free_pages import returning_large_pages

SIZE, PIECES = 24 * 2**20, 4  # each less than what always gets memory of its own; more than a thread has free


class Told(ctypes.Structure):
    _fields_ = [("counts", ctypes.c_size_t * 10)]


def count_own():  # bytes of what has memory of its own: hblkhd of mallinfo2
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Told
    return ask().counts[4]


def find_rise():  # by how much that rises with some large tensors, and without them again
    before = count_own()
    tensors = [torch.empty(SIZE, dtype=torch.uint8) for _ in range(PIECES)]
    made = count_own() - before
    del tensors
    return made, count_own() - before


with returning_large_pages():
    made, kept = find_rise()
assert made >= SIZE * PIECES, made
assert kept == 0, kept
assert find_rise() == (0, 0), "and afterwards as usual"
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator, which is not asked")
def test_large_tensors_go_back_to_the_system_inside_and_not_after() -> None:
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
