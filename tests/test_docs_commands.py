"""What the documents say to type in a shell is what the program takes: commands, options and their values."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from intrafusion.cli.main import app
from intrafusion.cli.program import OLD_OPTIONS

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("*s/README.md"))]
COMMANDS: dict[str, Any] = vars(get_command(app))["commands"]


def list_lines(page: Path) -> list[str]:
    """Lines of blocks and spans of code that call the program, without what a shell makes of them."""
    text = page.read_text(encoding="utf-8")
    blocks = [code for kind, code in re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.M | re.S) if kind != "python"]
    spans = re.findall(r"`([^`]+)`", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S))
    found = [*"\n".join(blocks).splitlines(), *(" ".join(span.split()) for span in spans)]
    return [line.removeprefix("$ ") for line in found if re.match(r"(\$ )?intrafusion [a-z]", line)]


def find_fault(line: str) -> str | None:
    """What the program says of a line, read and not carried out: no such command or option, a value of another kind."""
    _, name, *rest = shlex.split(line, comments=True)
    if name not in COMMANDS:
        return f"no command {name}"
    try:
        if rest:  # without, a command is named, not called
            COMMANDS[name].make_context(name, rest)
    except Exception as error:  # of click, or of what typer has of it
        return str(getattr(error, "format_message", error.__repr__)())
    return None


@pytest.mark.parametrize("page", [p for p in PAGES if list_lines(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_are_what_the_program_takes(page: Path) -> None:
    assert {line: fault for line in list_lines(page) if (fault := find_fault(line))} == {}


@pytest.mark.parametrize(
    "line", ["compres x", "compress x --kep 0.5", "compress x --keep", "export x y", "compress --json"]
)
def test_what_it_does_not_take_is_found(line: str) -> None:
    assert find_fault(f"intrafusion {line}")


def test_pages_are_read() -> None:
    read = {page.name for page in PAGES if list_lines(page)}
    assert read >= {"README.md", "start.md", "large.md", "saving.md", "choose.md"}


def test_options_alone_exist() -> None:
    known = {name for command in COMMANDS.values() for option in command.params for name in option.opts}
    known |= {"--help", "--version", "--smoke"} | {old for renamed in OLD_OPTIONS.values() for old in renamed}
    for page in PAGES:
        spans = re.findall(r"`(--[^`]+)`", page.read_text(encoding="utf-8"))
        assert {word for span in spans for word in re.findall(r"--[a-z][\w-]*", span)} <= known, page.name
