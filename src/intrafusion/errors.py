"""The errors a user can meet. Each message says where, what was expected, what was got, and what to do."""

from __future__ import annotations

import contextlib
import difflib
import os
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any

_LONGEST_TEXT = 4000  # characters of a message


class IntrafusionError(Exception):
    """Base of every error raised on purpose by this library. Its text is cut in the middle where names make it long."""

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT // 2]} ... {text[-_LONGEST_TEXT // 2 :]}"


class IntrafusionWarning(UserWarning):
    """Something was done as asked, and is probably not what was meant; the notes of the result say it too."""


class ModelError(IntrafusionError):
    """The network, or its example inputs, cannot be run or traced."""


class NoInputsError(ModelError):
    """No inputs can be made for a network like this one: they have to be given."""


class ArgumentError(IntrafusionError, ValueError):
    """An argument of a function that is of the wrong kind, or means nothing."""


class BudgetError(IntrafusionError, ValueError):
    """A keep, a pattern or a rounding that cannot be met."""


class RecipeError(IntrafusionError, ValueError):
    """An option, a method or a hyper-parameter that means nothing, or a recipe that cannot be read."""


class PlanError(IntrafusionError):
    """A plan that does not fit the network it is applied to."""


class DivergenceError(IntrafusionError):
    """A training whose loss is no number any more."""


class FolderError(IntrafusionError):
    """A saved folder or weight file that is not ours, is damaged, or must not be read."""


def unknown_name(kind: str, name: Any, valid: Iterable[str]) -> str:
    """One sentence for an unknown name, or for what is none: the nearest valid one, then all of them."""
    valid = sorted(set(valid))
    near = difflib.get_close_matches(name[:_LONGEST], valid, n=1, cutoff=0.4) if isinstance(name, str) else []
    hint = f" Did you mean {near[0]!r}?" if near else ""
    shown = ", ".join(valid[:30]) + (f", ... ({len(valid)} in all)" if len(valid) > 30 else "")
    return f"unknown {kind} {show(name)}.{hint} Valid: {shown}."


_LONGEST = 100  # characters of a value that messages show


class _Short(reprlib.Repr):
    """Values as messages show them: cut short where they are long, deep, or within themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, _LONGEST, _LONGEST

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, type):
            return f"the class {x.__qualname__}"
        if isinstance(x, int) and x.bit_length() > 2 * _LONGEST:
            return f"a whole number of {x.bit_length()} bits"
        if shape := getattr(x, "shape", None):
            kind = "a tensor" if hasattr(x, "layout") else "an array"
            return f"{kind} {str(getattr(x, 'dtype', '')).removeprefix('torch.')}{list(shape)}"
        return super().repr1(x, level)

    def repr_instance(self, x: Any, level: int) -> str:
        """Numbers, names and paths themselves; of other objects, whose text may be long, the class."""
        if x is None or x is ... or isinstance(x, (bool, complex, float, bytes, os.PathLike)) or hasattr(x, "item"):
            return super().repr_instance(x, level)
        name = getattr(x, "__qualname__", None)
        if isinstance(name, str):
            return f"the function {name}"
        return f"{'an' if type(x).__name__[:1].lower() in 'aeiou' else 'a'} {type(x).__name__}"


_SHORT = _Short()


def show(value: Any) -> str:
    """A value as a message shows it, whatever it is.

    >>> show("a" * 1000)
    "'aaa...aaa'"
    """
    return _SHORT.repr(value)


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Around what looks at a network while it runs: what fails inside is no failure of the network."""
    try:
        yield
    except IntrafusionError:
        raise
    except Exception as error:
        if not is_own_fault(error):  # one may be inside of another
            error.add_note(_OWN)
        raise


def is_own_fault(error: Exception) -> bool:
    """Whether it came out of `watching`."""
    return _OWN in getattr(error, "__notes__", ())


_OWN = "while intrafusion looked at the network"
