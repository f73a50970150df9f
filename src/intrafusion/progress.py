"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the name of the stage, steps done and steps in all."""


def silent(stage: str, done: int, total: int) -> None:
    """No progress shown."""
