"""What all commands share: where messages go, how errors end, and the progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from intrafusion.errors import FolderError, IntrafusionError
from intrafusion.io.folder import is_ours
from intrafusion.progress import Progress as Callback

_BAD_INPUT, ROLLED_BACK = 2, 3
EXIT_CODES = (
    "Exit codes: 0 done; 1 an error of the program; 2 bad usage or input, nothing was written; "
    "3 done, but a group had to be rolled back (compress --strict)."
)


def make_console(**options: Any) -> Console:
    """A console that prints text as it is: `mm.py:M:` is no emoji there, and `[red]` no colour."""
    return Console(**options, markup=False, emoji=False, highlight=False)


messages = make_console(stderr=True)


@contextmanager
def working() -> Iterator[None]:
    """Errors of the input end with one message and exit code 2; what a user's network prints goes to standard error."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (IntrafusionError, ValueError, OSError) as error:
        messages.print("error:", style="bold red", end=" ")
        messages.print(str(error), soft_wrap=True)
        raise typer.Exit(_BAD_INPUT) from error


@contextmanager
def progress_bar(title: str) -> Iterator[Callback]:
    """A bar on standard error, where that is a terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    hidden = not messages.is_terminal
    with Progress(*columns, console=messages, transient=True, redirect_stdout=False, disable=hidden) as bar:
        task = bar.add_task(title, total=None)

        def show(stage: str, done: int, total: int) -> None:
            bar.update(task, description=f"{title}: {stage}", completed=done, total=total)

        yield show


def check_output(folder: Path) -> None:
    """Refuse a folder that saving would refuse, before the work is done.

    Raises:
        FolderError: it is a file, or holds what intrafusion did not write.
    """
    taken = folder.exists() and not is_ours(folder)
    if taken and (not folder.is_dir() or any(folder.iterdir())):
        raise FolderError(f"{folder}: exists and was not written by intrafusion; choose another name, or move it away.")
