"""The code of docs/tracing.md runs, and prints what its comments say."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "tracing.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def run(block: str, names: dict[str, object]) -> list[str]:
    """The lines that a block of the page prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, PAGE.name, "exec", dont_inherit=True), names)
    return printed.getvalue().splitlines()


def promised(block: str) -> list[str]:
    """What a block says that it prints: comments on lines of their own, and behind a print."""
    return re.findall(r"^(?:print\(.*\)  )?# (.*)$", block, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def printed() -> list[list[str]]:
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "tracing"}
    return [run(block, names) for block in BLOCKS]


def test_every_block_prints_what_it_says(printed: list[list[str]]) -> None:
    assert sum(map(len, printed)) > 10
    for block, lines in zip(BLOCKS, printed, strict=True):
        patterns = [re.escape(line).replace(r"\.\.\.", ".+") for line in promised(block)]
        assert len(patterns) == len(lines), lines
        assert all(re.fullmatch(pattern, line) for pattern, line in zip(patterns, lines, strict=True)), lines


def test_the_rule_has_ten_lines() -> None:
    (block,) = [b for b in BLOCKS if "def follow_soft_threshold" in b]
    assert len([line for line in block.splitlines() if line.strip()]) <= 10


def test_the_picture_is_as_its_script_draws_it() -> None:
    script = PAGE.parent / "pictures" / "draw_tracing.py"
    names: dict[str, object] = {"__name__": "draw_tracing", "__file__": str(script)}
    exec(compile(script.read_text(encoding="utf-8"), script.name, "exec", dont_inherit=True), names)
    draw = names["draw"]
    assert callable(draw)
    assert draw() == script.with_name("tracing.svg").read_text(encoding="utf-8")
