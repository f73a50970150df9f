"""Memory given back to the system between steps: what one block took must not stay beside what the next one takes."""

from __future__ import annotations

import gc

from intrafusion.network.free_pages import return_free_pages


def release_memory() -> None:
    """Collect what is only held in circles, and return free pages."""
    gc.collect()
    return_free_pages()
