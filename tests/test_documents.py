"""JSON and YAML that nobody vouches for: a value, or a ValueError in words."""

from __future__ import annotations

import pytest

from intrafusion.documents import parse_json, parse_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(9)
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{', '.join([f'*{chr(97 + i)}'] * 20)}]}}\n" for i in range(9)
)


def test_what_is_plain_is_read() -> None:
    assert parse_json('{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}
    assert parse_yaml("a: &x [1, 2]\nb: *x\n") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[" * 200 + "]" * 200, "9" * 5000, b"\xff\xfe"], ids=range(6))
def test_what_json_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="."):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 10000 values"),
        (MERGED, "."),
        ("a: &a [*a]", "within itself"),
        ("[" * 30_000, "nested more than 100 deep"),
        ("2001-99-99", "month must be in"),
        ("!!bool maybe", "maybe"),
        ("!!int ''", "."),
        ("9" * 5000, "integer string conversion"),
        ("a: [", "."),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
    ids=range(10),
)
def test_what_yaml_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)
