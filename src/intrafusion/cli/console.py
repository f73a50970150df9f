"""What all commands share: where messages go, how commands end, and how they say how far they are."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from intrafusion.errors import IntrafusionError
from intrafusion.progress import Progress as Callback

_DEFECT, _BAD_INPUT, ROLLED_BACK, _INTERRUPTED = 1, 2, 3, 130
EXIT_CODES = (
    "Exit codes: 0 done; 1 an error of the program; 2 bad usage or input, nothing was written; "
    "3 done, but a group had to be rolled back (compress --strict); 130 interrupted."
)
_SHOW_TRACEBACK = "INTRAFUSION_TRACEBACK"
_QUIET_S = 30.0  # seconds after which a stage without a terminal says again how far it is


def make_console(**options: Any) -> Console:
    """A console that prints text as it is: `mm.py:M:` is no emoji there, and `[red]` no colour."""
    return Console(**options, markup=False, emoji=False, highlight=False)


messages = make_console(stderr=True)


@contextmanager
def working(kept: str = "nothing was written; the same command starts again.") -> Iterator[None]:
    """Errors of the input end with one message and exit code 2; what a user's network prints goes to standard error.

    Args:
        kept: what is left where the work is interrupted (exit code 130), and how to go on.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (IntrafusionError, ValueError, OSError) as error:
        _end("error:", str(error), _BAD_INPUT, error)
    except KeyboardInterrupt as error:
        _end("interrupted:", kept, _INTERRUPTED, error)
    except MemoryError as error:
        _end("error:", "there is not enough memory; give smaller inputs or fewer images.", _DEFECT, error)
    except Exception as error:
        _end("error:", _describe_defect(error), _DEFECT, error)


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
def progress_bar(title: str) -> Iterator[Callback]:
    """A bar on standard error where that is a terminal, else a line for each stage."""
    if not messages.is_terminal:
        yield _Lines(title)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=messages, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task(title, total=None)

        def show(stage: str, done: int, total: int) -> None:
            bar.update(task, description=f"{title}: {stage}", completed=done, total=total)

        yield show


class _Lines:
    """A line for each stage, and for a long one how far it is, now and then."""

    def __init__(self, title: str) -> None:
        self.title, self.stage, self.said = title, "", 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage == self.stage and now - self.said < _QUIET_S:
            return
        far = f" {done}/{total}" if stage == self.stage else ""
        self.stage, self.said = stage, now
        messages.print(f"{self.title}: {stage}{far}", soft_wrap=True)
