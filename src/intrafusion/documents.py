"""JSON and YAML that nobody vouches for: out comes a plain value, or a ValueError in words."""

from __future__ import annotations

import json
from typing import Any

import yaml

_DEPTH = 100
_MOST = 10_000  # values in a YAML text, each alias counting all that it stands for


class _Plain(yaml.SafeLoader):
    """No merging of mappings, which can grow without bound, and no depth, which takes PyYAML time squared."""

    flow_level: int

    def flatten_mapping(self, node: Any) -> None:
        pass

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level > _DEPTH:
            raise yaml.YAMLError(f"nested more than {_DEPTH} deep")
        super().fetch_flow_collection_start(TokenClass)


def parse_json(text: str | bytes) -> Any:
    """
    Raises:
        ValueError: not JSON, or nested too deeply.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    _check_extent(value, None)
    return value


def parse_yaml(text: str) -> Any:
    """
    Raises:
        ValueError: not YAML, nested too deeply, containing itself, or a few lines that stand for very many values.
    """
    try:
        value = yaml.load(text, _Plain)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except Exception as error:  # the constructors of PyYAML pass on whatever a value makes Python raise
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    _check_extent(value, _MOST)
    return value


def _check_extent(value: Any, most: int | None) -> None:
    """Walk a value as a tree, which finds an end unless it contains itself."""
    waiting, count = [(value, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        count += 1
        if depth > _DEPTH:
            raise ValueError(f"nested more than {_DEPTH} deep, or within itself")
        if most is not None and count + len(waiting) > most:
            raise ValueError(f"more than {most} values, aliases counted in full")
        if isinstance(item, dict):
            waiting += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, (list, tuple, set)):
            waiting += [(part, depth + 1) for part in item]
