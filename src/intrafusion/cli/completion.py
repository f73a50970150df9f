"""What the shell completes: names of networks, methods and devices."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from intrafusion.cli.models import NetworkKind, list_names

_WORDS, _AT = "COMP_WORDS", "COMP_CWORD"
"""How bash says what stands on the line, one word a line, and which of the words is completed."""


def complete_from(names: Iterable[str]) -> Callable[[str], list[str]]:
    """A completion among these names."""
    names = tuple(names)
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def complete_device(incomplete: str) -> list[str]:
    gpus = (f"cuda:{index}" for index in range(torch.cuda.device_count()))
    return _without_colons(incomplete, complete_from(("auto", "cpu", "cuda", *gpus))(incomplete))


def complete_model(incomplete: str) -> list[str]:
    """The places of networks, and, behind a colon, the networks that have a name there."""
    place, colon, _ = incomplete.partition(":")
    named = [f"{place}:{name}" for name in list_names(place)] if colon else [f"{k}:" for k in NetworkKind if k.named]
    return _without_colons(incomplete, complete_from(named)(incomplete))


def _without_colons(incomplete: str, found: list[str]) -> list[str]:
    """Bash takes a colon for the end of a word: it wants only what stands behind."""
    known = incomplete.rpartition(":")[0]
    return [_Rest(name.removeprefix(f"{known}:")) for name in found] if known and _WORDS in os.environ else found


class _Rest(str):
    """What follows what was typed, although it does not start with it, as typer asks of a completion."""

    def startswith(self, *_: Any) -> bool:
        return True


def join_words_at_colons() -> None:
    """Make one word again of what bash parted at colons, in the environment in which it asks for completions.

    >>> _join(["intrafusion", "inspect", "zoo", ":", "res", "--json"], 4)
    (['intrafusion', 'inspect', 'zoo:res', '--json'], 2)
    >>> _join(["intrafusion", "inspect", "zoo", ":"], 3)
    (['intrafusion', 'inspect', 'zoo:'], 2)
    """
    if _WORDS in os.environ and os.environ.get(_AT, "").isdecimal():
        words, at = _join(os.environ[_WORDS].split("\n"), int(os.environ[_AT]))
        os.environ |= {_WORDS: "\n".join(words), _AT: str(at)}


def _join(words: list[str], at: int) -> tuple[list[str], int]:
    joined: list[str] = []
    here = at
    for index, word in enumerate(words):
        if joined and ":" in (word, joined[-1][-1:]) and joined[-1]:
            joined[-1] += word
            here -= index <= at
        else:
            joined.append(word)
    return joined, here
