"""The model card of a saved folder: its README.md, which says in Markdown what was done and how to load it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intrafusion.errors import FolderError
from intrafusion.io.atomic import read_text
from intrafusion.plan import Plan, tabulate_plan

CARD = "README.md"
_MARK = "<!-- written by intrafusion; a changed file is yours, and stays: "
_ROWS = 12
_LONGEST = 200


@dataclass(frozen=True)
class Words:
    """What a compression says of itself.

    Attributes:
        figures: what was measured, and both values.
        done: against the loss, and what the user should know.
        tried: a header and a row for each size, where the smallest was looked for.
    """

    figures: Sequence[tuple[str, str]] = ()
    done: Sequence[str] = ()
    tried: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None


def build_card(data: Mapping[str, Any], plan: Plan, words: Words) -> str:
    """The text of the file, which ends in its own checksum.

    Args:
        data: what plan.json holds beside the plan.
    """
    name, groups = _name_original(data), tabulate_plan(plan)
    parts = [
        f"# {escape(re.split('[.:]', name)[-1])}, made smaller",
        f"From `{_plain(name)}`, with intrafusion and without training. What was done to each channel group is in "
        "`plan.json`.",
        _tabulate(("", "before -> after"), words.figures),
        "## Load it",
        f"```python\nimport intrafusion\n\n{_fence(_call_load(data))}\n```",
        *_describe_pretrained(data),
        *_describe_program(data),
        "## What was done",
        _list([*words.done, *plan.warnings]),
        *([] if words.tried is None else [_tabulate(*words.tried)]),
        _tabulate(groups.header, groups.rows),
        *_describe_rolled_back(data),
        "## Recipe",
        f"```yaml\n{_fence(plan.recipe.to_yaml().rstrip())}\n```",
        "## Made with",
        _list(_list_origins(data)),
    ]
    return _sign("\n\n".join(part for part in parts if part) + "\n")


def is_users_card(path: Path) -> bool:
    """Whether a file of the name of the card is somebody's own: written by hand, or changed since."""
    if path.name != CARD:
        return False
    try:
        text, mark, digest = read_text(path).rpartition(_MARK)
    except FolderError:  # a folder, or one that must not be read
        return True
    return not mark or digest != f"{_digest(text)} -->\n"


def escape(text: Any) -> str:
    """Text that Markdown shows as it is, on one line; the first part of what is very long."""
    shown = " ".join(str(text).split())
    shown = shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 3]}..."
    return re.sub(r"([\\`*_{}\[\]<|~&$]|^[#>+=-])", r"\\\1", shown)


def _sign(text: str) -> str:
    text += "\n"
    return f"{text}{_MARK}{_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _fence(text: str) -> str:
    """Nothing in it ends the block."""
    return text.replace("```", "'''")


def _plain(text: str) -> str:
    """What may stand between backticks."""
    return " ".join(text.replace("`", "'").split())[:_LONGEST]


def _name_original(data: Mapping[str, Any]) -> str:
    source, original = data.get("source"), data.get("original")
    if source:
        return f"{source['kind']}:{source['name']}"
    return original["name"] if original else "a network"


def _call_load(data: Mapping[str, Any]) -> str:
    """With what the reader of the card has to put in."""
    original = data.get("original")
    given = f", {original['name'].rpartition('.')[2]}" if original and not data.get("source") else ""
    return f'model = intrafusion.load("this/folder"{given})'


def _describe_pretrained(data: Mapping[str, Any]) -> list[str]:
    if not data.get("pretrained"):
        return []
    return [f"`transformers.{_plain(data['pretrained'])}.from_pretrained(folder)` opens the same network."]


def _describe_program(data: Mapping[str, Any]) -> list[str]:
    if not data.get("program"):
        return []
    batch = "batches of every size" if data["program"]["any_batch"] else "inputs of the shape of the example only"
    return [
        f"`program.pt2` is the network as a `torch.export` program, which runs without its class and takes {batch}: "
        "`intrafusion.load(folder, trust_program=True)`. Loading a program can run code; do it where you trust who "
        "wrote it."
    ]


def _describe_rolled_back(data: Mapping[str, Any]) -> list[str]:
    found = data.get("rolled_back") or {}
    return ["Left alone after all:", _list(f"{name}: {reason}" for name, reason in found.items())] if found else []


def _list_origins(data: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in data.get("made_with", {}).items())
    original = data.get("original")
    return [
        f"{versions}; {data.get('date', '')}",
        *([f"weights of the original: SHA-256 {original['sha256']}"] if original else []),
    ]


def _list(items: Iterable[str]) -> str:
    found = list(dict.fromkeys(items))
    more = [f"- and {len(found) - _ROWS} more"] if len(found) > _ROWS else []
    return "\n".join([*(f"- {escape(item)}" for item in found[:_ROWS]), *more])


def _tabulate(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([escape(cell) for cell in row] for row in rows[:_ROWS])]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\nand {len(rows) - _ROWS} more, in `plan.json`" if len(rows) > _ROWS else table
