"""How long work tells how far it is: a bar in a terminal or a notebook, else a line for each stage through `logging`.

Work says where it is with `report`; who looks is decided where the work begins, with `show_progress`, or
`shows_progress` around a function. What is called inside reports to the same.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import html
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from intrafusion.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[str, int, int], None]
"""Called with the name of the stage, steps done and steps in all."""

ShowProgress = Progress | bool | None
"""None: a bar where one can be seen and the work takes longer than a moment, else `logging`. False: nothing. True: at
once, on standard error if need be. Or a function that is told."""

P = ParamSpec("P")
R = TypeVar("R")

LOGGER = logging.getLogger("intrafusion")
LOGGER.addHandler(logging.NullHandler())

_PATIENCE_S = 1.5  # before a bar appears
_QUIET_S = 30.0  # after which a long stage has another line
_REDRAW_S = 0.1  # between two pictures in a notebook

_watcher: ContextVar[Progress | None] = ContextVar("watcher", default=None)
_screen = threading.Lock()  # one bar at a time


def silent(stage: str, done: int, total: int) -> None:
    """No progress shown."""


def report(stage: str, done: int = 0, total: int = 1) -> None:
    """Say how far the work is to whoever looks; `total` 1 means that nobody knows how long the stage takes."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(stage, done, total)


def shows_progress(title: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function whose keyword argument `progress` says how its progress is shown; see `ShowProgress`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def shown(*args: Any, progress: ShowProgress = None, **kwargs: Any) -> R:
            with show_progress(progress, title) as watcher:
                return cast(Callable[..., R], function)(*args, progress=watcher, **kwargs)

        return cast(Callable[P, R], shown)

    return decorate


@contextlib.contextmanager
def show_progress(progress: ShowProgress, title: str) -> Iterator[Progress]:
    """Show what is reported inside; work inside other work reports to where that does, unless it is told otherwise.

    Args:
        title: what the work is called.
    Raises:
        RecipeError: `progress` is none of these.
    """
    with _open(progress, title, _watcher.get()) as watcher:
        token = _watcher.set(watcher)
        try:
            yield watcher
        finally:
            _watcher.reset(token)


def _open(progress: ShowProgress, title: str, outer: Progress | None) -> contextlib.AbstractContextManager[Progress]:
    if progress is False:
        return contextlib.nullcontext(silent)
    if callable(progress):
        return contextlib.nullcontext(progress)
    if progress is not None and progress is not True:
        raise RecipeError(f"progress: expected True, False, None or a function (stage, done, total), got {progress!r}.")
    if outer is not None:
        return contextlib.nullcontext(outer)
    patience = 0.0 if progress else _PATIENCE_S
    if _is_notebook():
        return _Bar(title, _NotebookPicture(), patience)
    if _is_terminal():
        return _Bar(title, _TerminalPicture(), patience)
    return contextlib.nullcontext(StageLines(title, _print_line if progress else LOGGER.info))


def open_bar(title: str, console: Console) -> contextlib.AbstractContextManager[Progress]:
    """A bar on this console, at once."""
    return _Bar(title, _TerminalPicture(console), 0.0)


@contextlib.contextmanager
def prefix_stages(prefix: str) -> Iterator[None]:
    """Stages reported inside are part of a larger one: "step 2 of 4: tracing"."""
    outer = _watcher.get()
    token = _watcher.set(None if outer is None else lambda stage, *steps: outer(f"{prefix}: {stage}", *steps))
    try:
        yield
    finally:
        _watcher.reset(token)


# ---- lines ----------------------------------------------------------------------------------------------------------


def print_stages() -> None:
    """Have what is logged of stages printed on standard error, for programs that set up no logging themselves."""
    if not any(isinstance(handler, logging.StreamHandler) for handler in LOGGER.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        LOGGER.addHandler(handler)
        LOGGER.setLevel(logging.INFO)


class StageLines:
    """A line for each stage, and for a long one how far it is, now and then."""

    def __init__(self, title: str, say: Callable[[str], None], far: str = ", {} of {}") -> None:
        self.title, self.say, self.far, self.stage, self.said = title, say, far, "", 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage == self.stage and (now - self.said < _QUIET_S or done >= total):
            return
        far = self.far.format(done, total) if stage == self.stage and total > 1 else ""
        self.stage, self.said = stage, now
        self.say(f"{self.title}: {stage}{far}")


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---- bars -----------------------------------------------------------------------------------------------------------


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # no standard error, or a closed one
        return False


def _is_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return hasattr(shell, "kernel")


class _Bar:
    """A picture of how far the work is, drawn once it has lasted a while, also where nothing is reported."""

    def __init__(self, title: str, picture: _TerminalPicture | _NotebookPicture, patience: float) -> None:
        self.title, self.picture, self.patience = title, picture, patience
        self.lock, self.seen, self.over = threading.RLock(), False, False
        self.state, self.since = ("", 0, 1), (time.monotonic(), 0)

    def __enter__(self) -> _Bar:
        context = contextvars.copy_context()  # a notebook tells by it to which cell the bar belongs
        self.timer = threading.Timer(self.patience, lambda: context.run(self._appear))
        self.timer.daemon = True
        if self.patience > 0:
            self.timer.start()
        else:
            self._appear()
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        with self.lock:
            self.over = True
            if self.seen:
                self.picture.close()
                _screen.release()

    def __call__(self, stage: str, done: int, total: int) -> None:
        with self.lock:
            if stage != self.state[0] or done < self.state[1]:
                self.since = time.monotonic(), done
            self.state = stage, done, total
            if self.seen:
                self._draw()

    def _appear(self) -> None:
        with self.lock:
            if self.over or not _screen.acquire(blocking=False):
                return
            try:
                self.picture.open()
            except Exception:  # no bar is no reason to stop
                _screen.release()
                return
            self.seen = True
            self._draw()

    def _draw(self) -> None:
        stage, done, total = self.state
        began, first = self.since
        speed = (done - first) / max(1e-9, time.monotonic() - began)
        left = (total - done) / speed if speed > 0 else None
        label = f"{self.title}: {stage}" if stage else self.title
        self.picture.draw(label, done, total if total > 1 else None, left)


class _TerminalPicture:
    """A bar of rich's on standard error, and what else is printed meanwhile above it; nothing of it remains."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console

    def open(self) -> None:
        from rich.console import Console
        from rich.file_proxy import FileProxy
        from rich.progress import BarColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as Rich

        console = self.console or Console(stderr=True, markup=False, emoji=False, highlight=False)
        text = TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[far]}")
        # rich would send standard output to standard error, also where it goes to a file: streams are replaced below
        self.bar = Rich(
            SpinnerColumn(), *text, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self.task = self.bar.add_task("", total=None, far="")
        self.bar.start()
        self.replaced: list[tuple[str, Any, Any]] = []
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None and not isinstance(stream, FileProxy) and stream.isatty():
                self.replaced.append((name, stream, FileProxy(console, stream)))
                setattr(sys, name, self.replaced[-1][2])
        _drawn.append(self)

    def draw(self, label: str, done: int, total: int | None, left: float | None) -> None:
        far = "" if total is None else f"{done}/{total}" + ("" if left is None else f", {_format_time(left)} left")
        self.bar.update(self.task, description=label, completed=done, total=total, far=far)

    def close(self) -> None:
        self.give_back_streams()
        self.bar.stop()

    def give_back_streams(self) -> None:
        """Unless someone else has replaced them since."""
        for name, stream, proxy in self.replaced:
            if getattr(sys, name) is proxy:
                proxy.flush()
                setattr(sys, name, stream)
        self.replaced = []
        _drawn[:] = [picture for picture in _drawn if picture is not self]


_drawn: list[_TerminalPicture] = []


def _forget_bars() -> None:
    """In a forked process: the bar is its parent's, and so are the locks."""
    for picture in list(_drawn):
        for name, stream, _ in picture.replaced:
            setattr(sys, name, stream)
    _drawn.clear()
    _watcher.set(None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_bars)


class _NotebookPicture:
    """The bar of a browser, in the output of the cell."""

    def open(self) -> None:
        from IPython.display import display  # pyright: ignore

        self.drawn = 0.0
        self.handle: Any = display(_Shown(""), display_id=True)

    def draw(self, label: str, done: int, total: int | None, left: float | None) -> None:
        now = time.monotonic()
        if now - self.drawn < _REDRAW_S:
            return
        self.drawn = now
        size = "" if total is None else f' value="{done}" max="{total}"'
        far = "" if total is None else f" {done}/{total}" + ("" if left is None else f", {_format_time(left)} left")
        self.handle.update(_Shown(f"<div>{html.escape(label)} <progress{size}></progress>{far}</div>"))

    def close(self) -> None:
        self.handle.update(_Shown(""))


class _Shown:
    """What a notebook displays of it."""

    def __init__(self, page: str) -> None:
        self.page = page

    def __repr__(self) -> str:
        return ""

    def _repr_html_(self) -> str:
        return self.page


def _format_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
