"""What the commands print on standard output: tables for people, one JSON document for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import typer
import yaml

import intrafusion
from intrafusion.cli.console import make_console
from intrafusion.measure.size import Size
from intrafusion.plan import Plan, tabulate_plan
from intrafusion.table import TextTable

JSON_FORMAT = 1
"""Of the documents that `--json` prints; another number wherever a reader would have to change."""


def say(text: str) -> None:
    """One line of plain text, not wrapped."""
    make_console().print(text, soft_wrap=True)


def print_table(header: Sequence[str], lines: Iterable[Sequence[str]], *, numbers: bool = False) -> None:
    """A table as wide as the terminal; `numbers` puts all columns to the right."""
    say(str(TextTable(tuple(header), tuple(map(tuple, lines)), numbers=numbers)))


def print_json(command: str, data: Mapping[str, Any]) -> None:
    """One document, as docs/cli.schema.json describes it: numbers that JSON does not have are null."""
    head = {"intrafusion": intrafusion.__version__, "format": JSON_FORMAT, "command": command}
    typer.echo(json.dumps(_finite({**head, **data}), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def print_plan(plan: Plan, before: Size | None, after: Size | None) -> None:
    """What was done to each group, and the sizes if they are known."""
    say(str(tabulate_plan(plan, before, after)))


def plan_data(plan: Plan, before: Size | None, after: Size | None) -> dict[str, Any]:
    """The same for machines."""
    return {
        "before": asdict(before) if before else None,
        "after": asdict(after) if after else None,
        "groups": [asdict(decision) for decision in plan.decisions],
        "fixed": list(plan.fixed),
        "warnings": list(plan.warnings),
        "recipe": yaml.safe_load(plan.recipe.to_yaml()),
    }
