"""Why channels may not move: what the rules forbade, dimensions that were pinned, inputs, and what nothing reads."""

from __future__ import annotations

import numpy as np

from intrafusion.graph import Role
from intrafusion.trace.labels import FIXED
from intrafusion.trace.relations import Relations
from intrafusion.trace.uses import ROLE_BITS, Use


class Reasons:
    """For each label an index into the reasons, 0: none. The first reason that is found stays."""

    def __init__(self, relations: Relations, uses: list[Use]) -> None:
        self.texts: list[str] = [""]
        self.index = np.zeros(relations.count, np.int64)
        for labels, reason in relations.blocked:
            self._give(relations, labels, reason)
        for use in uses:
            pinned = relations.pins.get(use.key[:2])
            if pinned:
                self._give(relations, use.channels, f"{use.key[0]}, dimension {use.key[1]}: {pinned}")
        self._give(relations, np.array([FIXED]), "tied to the input of the network or to fixed data")
        self._give(relations, _find_unread(relations, uses), "nothing was seen to read these channels")

    def text_of(self, label: int) -> str | None:
        return self.texts[self.index[label]] or None

    def _give(self, relations: Relations, labels: np.ndarray, reason: str) -> None:
        roots = relations.roots(labels)
        roots = roots[self.index[roots] == 0]
        if len(roots):
            if self.texts[-1] != reason:
                self.texts.append(reason)
            self.index[roots] = len(self.texts) - 1


def _find_unread(relations: Relations, uses: list[Use]) -> np.ndarray:
    """Channels that no weight consumes and no reduction sees: unused, or read where tracing cannot follow."""
    produced, seen = np.zeros(relations.count, bool), np.zeros(relations.count, bool)
    for use in uses:
        produced[use.channels] = True
        seen[use.channels[use.roles & ROLE_BITS[Role.CONSUMES] > 0]] = True
    for labels, *_ in (*relations.block_members, *relations.dissolved):
        seen[relations.roots(labels)] = True
    for met in relations.gates:
        seen[relations.roots(met.gates)] = True
    return np.flatnonzero(produced & ~seen & ~relations.is_block[: relations.count])
