"""Memory given back to the system between steps: what one block took must not stay beside what the next one takes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from intrafusion.network.free_pages import return_free_pages


def release_memory() -> None:
    """Collect what is only held in circles, and return free pages."""
    gc.collect()
    return_free_pages()


@contextmanager
def only_new_collected() -> Iterator[None]:
    """Until the end, collections pass over what is alive now.

    Looking through all objects of a program that has imported large libraries takes half a second, several times for
    every block. What nothing refers to any more goes first: a network that was deleted would stay in memory. A program
    that has frozen objects itself keeps them as they are.
    """
    if gc.get_freeze_count():
        yield
        return
    release_memory()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
