"""The code of docs/extend.md runs, and does what it says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from intrafusion.checks import LAWS
from intrafusion.importance import NEEDS

PAGE = Path(__file__).parents[1] / "docs" / "extend.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def page() -> tuple[dict[str, Any], str]:
    """What the blocks define, run one after the other, and what they print."""
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "extend"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for index, block in enumerate(BLOCKS):
            exec(compile(block, f"{PAGE.name}, block {index}", "exec", dont_inherit=True), names)
    return names, printed.getvalue()


def test_the_reducer_makes_the_network_smaller(page: tuple[dict[str, Any], str]) -> None:
    names, printed = page
    assert names["small"].model[0].out_channels == 8
    assert "16 -> 8   mixed" in printed


def test_the_reducer_has_fifteen_lines() -> None:
    (block,) = [b for b in BLOCKS if "class Nearest:" in b]
    lines = [line for line in block.splitlines() if line.strip()]
    assert len(lines) <= 15


def test_the_restorer_does_what_it_says(page: tuple[dict[str, Any], str]) -> None:
    """The mean output is the original's."""
    names, _ = page
    model, small, images = names["model"], names["small"].model, names["images"]
    with torch.no_grad():
        torch.testing.assert_close(small(images).mean(0), model(images).mean(0), rtol=1e-4, atol=1e-5)


def test_the_table_of_needs_is_complete() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (yes|no) \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {name: answer == "yes" for name, answer in rows} == NEEDS


def test_the_broken_reducer_says_so(page: tuple[dict[str, Any], str]) -> None:
    _, printed = page
    assert "Forgetful() breaks the law 'absorbs duplicates'" in printed
    assert all(f"{name}: {law}" in printed for name, law in LAWS.items())
