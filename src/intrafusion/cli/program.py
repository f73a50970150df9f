"""How the commands are called: completion by the shell, and what options were called before."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.core import TyperCommand

from intrafusion.arguments import expand_home
from intrafusion.cli.completion import join_words_at_colons
from intrafusion.cli.console import messages
from intrafusion.cli.defaults import told_defaults

OLD_OPTIONS = {
    "experiment": {
        "--batch": "--batch-size",
        "--criterion": "--importance",
        "--network": "--model",
        "--training-images": "--train-images",
    },
    "split-train": {"--limit": "--train-images"},
}
"""Options of version 0.1 by command, and what they are called now."""


_IN_HOME = re.compile(r"((?:--[\w-]+=)?(?:\w+:)?)(~(?:/.*)?)", re.DOTALL)  # what is in front of ~, and the path


class Program(typer.Typer):
    """The program, which understands the words of every shell that completes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        join_words_at_colons()
        return super().__call__(*args, **kwargs)


class Command(TyperCommand):
    """A command that shows all defaults, and also takes the old names of its options, and says the new one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        told = told_defaults(self.callback)
        for option in self.params:
            if option.name in told:
                option.show_default = told[option.name]  # pyright: ignore[reportAttributeAccessIssue]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = OLD_OPTIONS.get(self.name or "", {})
        return super().parse_args(ctx, [expand_word(_rename(word, known)) for word in args])


def expand_word(word: str) -> str:
    """With the home of the user for ~, where no shell did that: behind --option= and hf:, or in quotes."""
    found = _IN_HOME.fullmatch(word)
    return word if found is None else f"{found[1]}{expand_home(found[2])}"


def _rename(word: str, known: dict[str, str]) -> str:
    name, equals, value = word.partition("=")
    if name not in known:
        return word
    messages.print(f"note: {name} is called {known[name]} now.", soft_wrap=True)
    return f"{known[name]}{equals}{value}"
