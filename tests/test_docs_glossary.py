"""Every word of docs/glossary.md that names an object of the code names one that exists."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
ROWS = [re.split(r"(?<!\\)\|", line)[1:-1] for line in PAGE.splitlines() if line.startswith("|")]
WORDS = [[cell.strip() for cell in row] for row in ROWS if row[0].strip() not in ("word", "---")]
NAMES = sorted(set(re.findall(r"`(intrafusion[\w.]*)`", PAGE)))


def find(dotted: str) -> object:
    """The object of a dotted name: its longest prefix that is a module, then attributes, or fields of a dataclass."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            found = find_attribute(found, name)
        return found
    raise AssertionError(f"{dotted} is in no module")


def find_attribute(owner: Any, name: str) -> Any:
    if is_dataclass(owner) and name in {field.name for field in fields(owner)}:
        return name
    return getattr(owner, name) if isinstance(owner, ModuleType) else inspect.getattr_static(owner, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_exists(name: str) -> None:
    assert find(name) is not None


@pytest.mark.parametrize(
    "name", ["intrafusion.Nothing", "intrafusion.graph.Member.nothing", "intrafusion.nothing.Plan"]
)
def test_a_wrong_name_is_noticed(name: str) -> None:
    with pytest.raises(AttributeError):
        find(name)


def test_words_are_explained_once_in_a_sentence_or_two() -> None:
    assert len(WORDS) >= 40
    single = [word for row in WORDS for word in row[0].split(", ")]
    assert len(set(single)) == len(single)
    assert [row[0] for row in WORDS if len(row) != 3 or not row[2].endswith(".") or len(row[2]) > 200] == []


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "docs/methods.md", "docs/extend.md", "docs/tracing.md", "docs/saving.md"]
)
def test_the_glossary_is_linked(page: str) -> None:
    assert "glossary.md" in (ROOT / page).read_text(encoding="utf-8")
