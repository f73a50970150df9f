"""Progress is seen where it can be, and leaves nothing behind."""

from __future__ import annotations

import html
import io
import logging
import os
import pty
import re
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from torch import nn

import intrafusion
from intrafusion import progress as module
from intrafusion.errors import ArgumentError
from intrafusion.progress import (
    StageLines,
    prefix_stages,
    print_stages,
    report,
    show_progress,
    shows_progress,
)

Steps = list[tuple[str, int, int]]
X = torch.randn(2, 4)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def noting(steps: Steps) -> Callable[[str, int, int], None]:
    return lambda stage, done, total: steps.append((stage, done, total))


# ---- who is told ----------------------------------------------------------------------------------------------------


def test_what_is_reported_reaches_the_function_that_was_given() -> None:
    steps: Steps = []
    with show_progress(noting(steps), "work"):
        report("one", 1, 2)
        report("another")
    report("later")
    assert steps == [("one", 1, 2), ("another", 0, 1)]


def test_work_inside_work_reports_to_the_same() -> None:
    @shows_progress("inner")
    def inner(*, progress: Any = None) -> None:
        report("inside", 0, 3)

    steps: Steps = []
    with show_progress(noting(steps), "outer"):
        inner()
        inner(progress=True)
        inner(progress=False)
        with prefix_stages("step 1 of 2"):
            inner()
        inner()
    assert steps == [("inside", 0, 3)] * 2 + [("step 1 of 2: inside", 0, 3), ("inside", 0, 3)]


def test_after_an_error_nobody_is_told_any_more() -> None:
    steps: Steps = []
    with pytest.raises(ZeroDivisionError), show_progress(noting(steps), "work"), prefix_stages("part"):
        raise ZeroDivisionError
    report("later")
    assert steps == []


@pytest.mark.parametrize("wrong", ["yes", 1, 0.0, []])
def test_what_is_no_way_to_show_progress_is_refused(wrong: Any) -> None:
    with pytest.raises(ArgumentError, match=r"progress: expected a function of 3 arguments or True or False or None"):
        intrafusion.inspect(net(), X, progress=wrong)


@pytest.mark.parametrize(
    "work",
    [
        lambda **how: intrafusion.compress(net(), X, 0.5, **how),
        lambda **how: intrafusion.compress_in_steps(net(), X, 0.5, 2, **how),
        lambda **how: intrafusion.inspect(net(), X, **how),
        lambda **how: intrafusion.fuse([net(), net()], X, **how),
    ],
    ids=["compress", "steps", "inspect", "fuse"],
)
def test_stages_are_counted_to_their_ends(work: Callable[..., Any]) -> None:
    steps: Steps = []
    work(progress=noting(steps))
    last = {stage: (done, total) for stage, done, total in steps}
    assert any("tracing the network" in stage for stage in last)
    assert all(done == total for done, total in last.values()), last


def test_layers_are_counted_while_they_are_restored() -> None:
    steps: Steps = []
    intrafusion.compress(net(), X, 0.5, images=torch.randn(64, 4), progress=noting(steps))
    assert [step[1:] for step in steps if step[0] == "restoring layers"] == [(0, 2), (1, 2), (2, 2)]


# ---- without a terminal ---------------------------------------------------------------------------------------------


def test_without_a_terminal_each_stage_is_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "intrafusion"):
        intrafusion.inspect(net(), X)
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("intrafusion", "INFO", "inspect: tracing the network"),
        ("intrafusion", "INFO", "inspect: proving channel groups"),
    ]


@pytest.mark.parametrize(("how", "lines"), [(None, 0), (False, 0), (True, 2)])
def test_nothing_is_printed_unless_it_is_asked_for(how: Any, lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    intrafusion.inspect(net(), X, progress=how)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == lines


def test_false_is_not_logged_either(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "intrafusion"):
        intrafusion.inspect(net(), X, progress=False)
    assert caplog.records == []


def test_long_stages_have_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], list[str]()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    say = StageLines("compress", said.append)
    for second in range(100):
        now[0] = float(second)
        say("making 50 % images", second, 100)
    say("restoring", 0, 1)
    assert said == [
        "compress: making 50 % images",
        *(f"compress: making 50 % images, {second} of 100" for second in (30, 60, 90)),
        "compress: restoring",
    ]


def test_a_program_can_have_the_stages_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module.LOGGER, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(module.LOGGER, "level", logging.NOTSET)
    print_stages()
    print_stages()
    intrafusion.inspect(net(), X)
    module.LOGGER.setLevel(logging.NOTSET)
    assert capsys.readouterr().err.splitlines() == [
        "inspect: tracing the network",
        "inspect: proving channel groups",
    ]


# ---- in a terminal --------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, time, warnings
from intrafusion.progress import report, show_progress
from intrafusion import progress
progress._PATIENCE_S = {patience}
try:
    with show_progress(None, "compress"):
        report("restoring layers", 0, 3)
        while {wait} and not progress._drawn:
            time.sleep(0.01)
        print("a line for standard output")
        warnings.warn("a warning")
        report("restoring layers", 1, 3)
        with show_progress(None, "inner"):
            report("restoring layers", 2, 3)
        {then}
except (ValueError, KeyboardInterrupt):
    pass
print("own streams:", type(sys.stdout).__name__, type(sys.stderr).__name__, file=sys.stderr)
"""


def run_in_terminal(*, wait: bool, patience: float = 0.0, then: str = "pass", file: Path | None = None) -> str:
    """What a terminal is sent by a program whose standard error, and output unless there is a file, it is."""
    code = SCRIPT.format(wait=wait, patience=patience, then=then)
    ours, theirs = pty.openpty()
    name = os.ttyname(theirs)
    done = programs.run(["-c", code], out=file or name, err=name, TERM="xterm", COLUMNS="100")
    assert done.returncode == 0
    os.close(theirs)
    sent = b""
    try:
        while part := os.read(ours, 65536):
            sent += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    return sent.decode()


def lines_left(sent: str) -> list[str]:
    """What is left on the screen: lines that were not deleted."""
    screen, row = [""], 0
    for part in re.split(r"(\x1b\[[\d;?]*[a-zA-Z]|\r|\n)", sent):
        if part == "\n":
            row += 1
            screen += [""] if row == len(screen) else []
        elif part == "\x1b[1A":
            row = max(0, row - 1)
        elif part == "\x1b[2K":
            screen[row] = ""
        elif part and not part.startswith("\x1b") and part != "\r":
            screen[row] += part
    return [line for line in screen if line]


@pytest.mark.parametrize("then", ["pass", "raise ValueError", "raise KeyboardInterrupt"])
def test_a_bar_appears_and_leaves_what_was_printed_and_nothing_else(then: str) -> None:
    sent = run_in_terminal(wait=True, then=then)
    assert "compress: restoring layers" in sent
    assert "2/3" in sent
    assert sent.count("\x1b[?25l") == sent.count("\x1b[?25h") == 1  # one bar, and the cursor is back
    left = lines_left(sent)
    assert left[0] == "a line for standard output"
    assert "UserWarning: a warning" in left[1]
    assert left[-1] == "own streams: TextIOWrapper TextIOWrapper"
    assert len(left) == 3, left


def test_short_work_shows_nothing() -> None:
    sent = run_in_terminal(wait=False, patience=60)
    assert "compress" not in sent
    assert "\x1b" not in sent


def test_what_goes_to_a_file_stays_there(tmp_path: Path) -> None:
    sent = run_in_terminal(wait=True, file=tmp_path / "out")
    assert "compress: restoring layers" in sent
    assert (tmp_path / "out").read_text() == "a line for standard output\n"


def test_a_forked_process_has_its_own_streams_and_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", proxy := io.StringIO())
    picture = types.SimpleNamespace(replaced=[("stdout", own := io.StringIO(), proxy)])
    monkeypatch.setattr(module, "_drawn", [picture])
    steps: Steps = []
    with show_progress(noting(steps), "work"):
        module._forget_bars()
        report("in the child", 0, 1)
    assert sys.stdout is own
    assert module._drawn == []
    assert steps == []


# ---- in a notebook --------------------------------------------------------------------------------------------------


class Cell:
    """The output of a cell: what it showed, one after another."""

    def __init__(self) -> None:
        self.pages: list[str] = []

    def update(self, shown: Any) -> None:
        self.pages.append(shown._repr_html_())

    def display(self, shown: Any, *, display_id: bool) -> Cell:
        self.update(shown)
        return self


def test_a_notebook_shows_a_bar_without_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell()
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=cell.display))
    monkeypatch.setattr(module, "_REDRAW_S", 0.0)
    with show_progress(True, "compress <b>"):
        while not cell.pages:
            time.sleep(0.01)
        report("restoring", 1, 4)
    shown = [html.unescape(re.sub(r"<[^b][^>]*>", "", page)) for page in cell.pages]
    assert any("compress <b>: restoring" in text and "1/4" in text for text in shown)
    assert any('<progress value="1" max="4">' in page for page in cell.pages)
    assert cell.pages[-1] == ""


def test_a_closed_standard_error_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (None, io.StringIO()):
        if stream is not None:
            stream.close()
        monkeypatch.setattr(sys, "stderr", stream)
        with show_progress(None, "work"):
            report("on", 0, 1)
