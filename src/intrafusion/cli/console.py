"""What all commands share: where messages go, how commands end, and how they say how far they are."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from intrafusion.errors import IntrafusionError, IntrafusionWarning
from intrafusion.progress import Progress, StageLines, open_bar, show_progress

_DEFECT, _BAD_INPUT, ROLLED_BACK, _INTERRUPTED = 1, 2, 3, 130
EXIT_CODES = (
    "Exit codes: 0 done; 1 an error of the program; 2 bad usage or input, nothing was written; "
    "3 done, but a group had to be rolled back (compress --strict); 130 interrupted."
)
_SHOW_TRACEBACK = "INTRAFUSION_TRACEBACK"


def make_console(**options: Any) -> Console:
    """A console that prints text as it is: `mm.py:M:` is no emoji there, and `[red]` no colour."""
    return Console(**options, markup=False, emoji=False, highlight=False)


messages = make_console(stderr=True)


class Kept:
    """What a command that writes at its end has written so far."""

    def __init__(self) -> None:
        self._paths: list[Path] = []

    def add(self, path: Path) -> None:
        self._paths.append(path)

    def __str__(self) -> str:
        if not self._paths:
            return "nothing was written; the same command starts again."
        return f"{', '.join(map(str, self._paths))} is written; the rest is not, and the same command starts again."


@contextmanager
def working(kept: object = Kept()) -> Iterator[None]:
    """Errors of the input end with one message and exit code 2; what a user's network prints goes to standard error.

    Args:
        kept: says as text what is left where the work is interrupted (exit code 130), and how to go on.
    """
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, warnings.showwarning)
            yield
    except (IntrafusionError, ValueError, OSError) as error:
        _end("error:", str(error), _BAD_INPUT, error)
    except KeyboardInterrupt as error:
        _end("interrupted:", str(kept), _INTERRUPTED, error)
    except MemoryError as error:
        _end("error:", "there is not enough memory; give smaller inputs or fewer images.", _DEFECT, error)
    except Exception as error:
        _end("error:", _describe_defect(error), _DEFECT, error)


def _show_warning(otherwise: Callable[..., None], message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Ours in one line, without the place in the code of a command, which tells nobody anything."""
    if issubclass(category, IntrafusionWarning):
        messages.print(f"warning: {message}", soft_wrap=True)
    else:
        otherwise(message, category, *place)


def _end(title: str, text: str, code: int, error: BaseException) -> None:
    if os.environ.get(_SHOW_TRACEBACK):
        messages.print(traceback.format_exc(), soft_wrap=True)
    messages.print(title, style="bold red", end=" ")
    messages.print(text, soft_wrap=True)
    raise typer.Exit(code) from error


def _describe_defect(error: Exception) -> str:
    """An error that is nobody's input: of the program, or of the network's own code."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {error}\n"
        f"This is a defect of intrafusion, or of the network. {_SHOW_TRACEBACK}=1 shows where it came from; "
        "please report it with that."
    )


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A bar on standard error where that is a terminal, else a line for each stage."""
    lines = StageLines(title, lambda line: messages.print(line, soft_wrap=True), far=" {}/{}")
    shown = open_bar(title, messages) if messages.is_terminal else nullcontext(lines)
    with shown as watcher, show_progress(watcher, title) as progress:
        yield progress
