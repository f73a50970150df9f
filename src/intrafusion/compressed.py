"""Compressed: what was obtained."""

from __future__ import annotations

import os
from dataclasses import dataclass

from torch import nn

from intrafusion.apply import Repair
from intrafusion.io import folder as folders
from intrafusion.measure.size import Size
from intrafusion.plan import Plan
from intrafusion.report import table


@dataclass(frozen=True, eq=False)
class Compressed:
    """The smaller network, the plan that was carried out, and its size before and after.

    Attributes:
        plan: what was done to each group, and why where nothing was.
        repairs: attributes of modules that had to follow the new sizes.
    """

    model: nn.Module
    plan: Plan
    before: Size
    after: Size
    repairs: tuple[Repair, ...] = ()

    def __str__(self) -> str:
        return table.text(self.plan, self.before, self.after)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write weights (safetensors), plan.json and recipe.yaml; `intrafusion.load` reads them.

        Raises:
            FolderError: the folder exists and was not written by intrafusion.
        """
        folders.save(self.model, self.plan, folder, repairs=self.repairs, before=self.before, after=self.after)
