"""Where in a network modules lie: around and inside each other, by their names."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile


def find_scope(modules: Iterable[str]) -> str:
    """The smallest module around several; of a single one, that in which it lies; of none, the network.

    >>> find_scope(["block.attn.q", "block.attn.k"]), find_scope(["block.fc"])
    ('block.attn', 'block')
    """
    paths = [m.split(".") for m in dict.fromkeys(modules)]
    if len(paths) == 1:
        return ".".join(paths[0][:-1])
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared)


def is_inside(name: str, scope: str) -> bool:
    """Whether a module is this one or lies in it; all lie in the network, whose name is empty.

    >>> is_inside("block.attn", "block"), is_inside("blocks", "block"), is_inside("block", "")
    (True, False, True)
    """
    return not scope or name == scope or name.startswith(f"{scope}.")
