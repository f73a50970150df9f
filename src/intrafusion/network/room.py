"""Whether the matrices of wide groups fit into memory, told before anything is made."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from intrafusion.errors import ModelError
from intrafusion.network.free_memory import describe_bytes, find_free_memory

_NUMBER = 8  # bytes, float64


def find_too_wide(sizes: Mapping[str, int], device: torch.device) -> dict[str, str]:
    """The widest of these groups, as many as must go for an n x n matrix of each of the others to fit; with the reason.

    Args:
        sizes: channels n, by name of the group.
    """
    free, found = find_free_memory(device), dict[str, str]()
    needed = {name: _NUMBER * n * n for name, n in sizes.items()}
    for name in sorted(needed, key=needed.__getitem__, reverse=True):
        if sum(needed.values()) <= free:
            break
        taken = needed.pop(name)
        found[name] = (
            f"a matrix of its {sizes[name]:,} x {sizes[name]:,} channels takes {describe_bytes(taken)}, and "
            f"{describe_bytes(free)} are free; use a machine with more memory"
        )
    return found


def check_room(sizes: Mapping[str, int], held: Mapping[str, int], device: torch.device) -> None:
    """Refuse groups that are too wide for their channels to be chosen.

    Args:
        sizes: channels n, by name of the group.
        held: how many matrices of n x n numbers are kept of each; of the one that is in work, two more are made.
    Raises:
        ModelError: the matrices take more than is free.
    """
    if not sizes:
        return
    widest = max(sizes, key=sizes.__getitem__)
    needed = _NUMBER * (sum(held.get(name, 0) * n * n for name, n in sizes.items()) + 2 * sizes[widest] ** 2)
    free = find_free_memory(device)
    if needed > free:
        other = "" if not held else "choose by weights alone (reducer='select', or no inputs), "
        raise ModelError(
            f"group {widest!r}: choosing among {sizes[widest]:,} channels takes at least {describe_bytes(needed)} for "
            f"matrices of all pairs, expected at most the {describe_bytes(free)} that are free: {other}leave it as it "
            f"is (exclude, or include others), or use a machine with more memory."
        )
