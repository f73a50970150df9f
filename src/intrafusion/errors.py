"""The errors a user can meet. Each message says where, what was expected, what was got, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class IntrafusionError(Exception):
    """Base of every error raised on purpose by this library."""


class IntrafusionWarning(UserWarning):
    """Something was done as asked, and is probably not what was meant; the notes of the result say it too."""


class ModelError(IntrafusionError):
    """The network, or its example inputs, cannot be run or traced."""


class BudgetError(IntrafusionError, ValueError):
    """A keep, a pattern or a rounding that cannot be met."""


class RecipeError(IntrafusionError, ValueError):
    """An option, a method or a hyper-parameter that means nothing, or a recipe that cannot be read."""


class PlanError(IntrafusionError):
    """A plan that does not fit the network it is applied to."""


class FolderError(IntrafusionError):
    """A saved folder or weight file that is not ours, is damaged, or must not be read."""


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> str:
    """One sentence for an unknown name: the nearest valid one, then all of them."""
    valid = sorted(set(valid))
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    shown = ", ".join(valid[:30]) + (f", ... ({len(valid)} in all)" if len(valid) > 30 else "")
    return f"unknown {kind} {name!r}.{hint} Valid: {shown}."
