"""A way to make a network smaller, written as text: a reducer with options, and what is done against the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from intrafusion.documents import parse_yaml
from intrafusion.errors import RecipeError
from intrafusion.reduce import Reducer
from intrafusion.registry import registry_of

OURS = "ours"
"""The word for the default of `compress`, pivoted and then solved by least squares on the best that there is."""

_OURS_ON = {True: "pivot+images", False: "pivot+noise"}


@dataclass(frozen=True)
class Method:
    """A reducer, and the steps after it as `Recipe.restore` takes them."""

    reducer: Reducer
    restore: tuple[Any, ...] = ()


def spell_ours(method: str, *, images: bool) -> str:
    """The method that the word stands for where there are images to solve the layers on, or none; others as they are.

    >>> spell_ours("ours", images=False), spell_ours("fold", images=False)
    ('pivot+noise', 'fold')
    """
    return _OURS_ON[images] if method == OURS else method


def parse_method(text: str) -> Method:
    """Read NAME[:option=value,...] of a reducer, and any number of +NAME[:option=value,...] of steps against the loss.

    >>> parse_method("intrafusion:normalization=function,bias=false+closed_form").reducer.normalization
    'function'

    Raises:
        RecipeError: an unknown reducer or step, or an option or value that it does not take.
    """
    first, *rest = text.split("+")
    return Method(registry_of("reducer").resolve(_method_data(first)), tuple(map(_parse_step, rest)))


def _parse_step(text: str) -> Any:
    """A step against the loss, as a recipe takes it: a plain name stays a name."""
    found, steps = _method_data(text), registry_of("restorer")
    if len(found) == 1:
        found = found["name"]
    elif found["name"] in steps.words:
        raise RecipeError(f"method: {found['name']!r} takes no options, got {text!r}.")
    return steps.resolve(found, words=steps.words)


def _method_data(text: str) -> dict[str, Any]:
    name, _, options = text.strip().partition(":")
    found: dict[str, Any] = {"name": name}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if not equals:
            raise RecipeError(f"method {text!r}: expected NAME:option=value,option=value, got {option!r}.")
        try:
            found[key.strip()] = parse_yaml(value)
        except ValueError as error:
            raise RecipeError(f"method {text!r}: {option!r} is not YAML ({error}); put text in quotes.") from error
    return found
