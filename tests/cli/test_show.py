"""What is printed: names and messages as they are, whatever they would mean to the terminal's mark-up."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from click.testing import Result

from intrafusion.cli import console
from intrafusion.cli.show import print_table, say

Program = Callable[[str], Result]
NAMES = ["mm.py:M: a", "a[b]", "[red]x[/red]", ":smile:", "[/]", "\\[b]", "[link=x]y"]


@pytest.mark.parametrize("name", NAMES)
def test_lines_and_tables_print_text_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(name)
    print_table(("n", name), [("1", name)])
    line, header, _, row = capsys.readouterr().out.splitlines()
    assert line == name
    assert header.split() == ["n", *name.split()]
    assert row.split() == ["1", *name.split()]


@pytest.mark.parametrize("name", NAMES)
def test_the_bar_prints_text_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    terminal = console.make_console(file=shown, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(console, "messages", terminal)
    with console.progress_bar(name) as progress:
        progress(name, 1, 2)
    assert f"{name}: {name}" in shown.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_errors_print_text_as_it_is(name: str, program: Program) -> None:
    name = name.replace(" ", "")
    result = program(f"inspect {name}")
    assert result.exit_code == 2
    assert name in result.stderr or repr(name) in result.stderr


def test_a_network_that_fails_is_named_as_it_was_given(program: Program) -> None:
    result = program("inspect nets.py:Net --arg nope=[red] --input 2,4")
    assert result.exit_code == 2
    assert "error: nets.py:Net: calling it raised TypeError: " in result.stderr
