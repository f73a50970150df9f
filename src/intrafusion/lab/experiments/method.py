"""A way to make a network smaller, written as text: a reducer with options, and what is done against the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from intrafusion import reduce, restore
from intrafusion.recipe import RecipeError, method_from_data
from intrafusion.reduce import Reducer

ORIGINAL = "original"


@dataclass(frozen=True)
class Method:
    """A reducer, and the steps after it as `Recipe.restore` takes them."""

    reducer: Reducer
    restore: tuple[Any, ...] = ()


def parse_method(text: str) -> Method:
    """Read NAME[:option=value,...] of a reducer, and any number of +NAME[:option=value,...] of steps against the loss.

    >>> parse_method("intrafusion:normalization=function,bias=false+closed_form").reducer.normalization
    'function'

    Raises:
        RecipeError: an unknown reducer, or an option that it does not have.
        ValueError: an unknown step, or a value that a method does not take.
    """
    first, *rest = text.split("+")
    return Method(
        method_from_data(method_data(first), reduce.REDUCERS, "reducer"), tuple(parse_step(part) for part in rest)
    )


def parse_step(text: str) -> Any:
    found = method_data(text)
    if found["name"] not in ("auto", *restore.LEVELS):
        restore.get(found)
    elif len(found) > 1:
        raise ValueError(f"method: {found['name']!r} takes no options, got {text!r}.")
    return found if len(found) > 1 else found["name"]


def method_data(text: str) -> dict[str, Any]:
    name, _, options = text.strip().partition(":")
    found: dict[str, Any] = {"name": name}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if not equals:
            raise RecipeError(f"method {text!r}: expected NAME:option=value,option=value, got {option!r}.")
        found[key.strip()] = yaml.safe_load(value)
    return found
