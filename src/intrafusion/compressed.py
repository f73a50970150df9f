"""Compressed: what was obtained."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import nn

from intrafusion.arguments import checked
from intrafusion.brief import show_briefly
from intrafusion.io import folder as folders
from intrafusion.io.card import Words
from intrafusion.io.line import write_line_of
from intrafusion.measure.size import Size
from intrafusion.network.identity import Identity
from intrafusion.network.inputs import Inputs
from intrafusion.network.wrappers import unwrap
from intrafusion.plan import Plan, size_change, tabulate_plan
from intrafusion.surgery.write import Repair
from intrafusion.table import TextTable


@dataclass(frozen=True)
class Restoration:
    """One step against the loss: what was done, on what, how long it took and what it gained.

    Attributes:
        step: name of the restorer.
        on: the images it was done on, None for none.
        seconds: images made from the network included.
        error_before: mean squared difference of the outputs to the original's on these images, as a fraction of the
            variance of the original's; None without images.
        error_after: the same after the step.
        note: why not something better, where it was chosen automatically.
    """

    step: str
    on: str | None
    seconds: float
    error_before: float | None = None
    error_after: float | None = None
    note: str | None = None

    __repr__ = show_briefly

    def __str__(self) -> str:
        on = f" on {self.on}" if self.on else ""
        gain = "" if self.error_after is None else f", output error {self.error_before:.3f} -> {self.error_after:.3f}"
        return f"restored: {self.step}{on}, {self.seconds:.1f} s{gain}" + (f" ({self.note})" if self.note else "")


@checked
@dataclass(frozen=True, eq=False)
class Compressed:
    """The smaller network, the plan that was carried out, and its size before and after.

    Attributes:
        plan: what was done to each group, and why where nothing was.
        inputs: one call of the network, as it was given.
        repairs: attributes of modules that had to follow the new sizes.
        restored: what was done against the loss, in order.
        images: what the layers were solved on, if anything.
        notes: what the user should know, such as a budget that could not be met.
        rolled_back: groups that were to be reduced and could not be, with the reason.
        original: what tells the original from other networks.
    """

    model: nn.Module
    plan: Plan
    before: Size
    after: Size
    inputs: Inputs
    repairs: tuple[Repair, ...] = ()
    restored: tuple[Restoration, ...] = ()
    images: Inputs | None = None
    notes: tuple[str, ...] = ()
    rolled_back: Mapping[str, str] = field(default_factory=dict)
    original: Identity | None = None

    __repr__ = show_briefly

    def __str__(self) -> str:
        return str(_tabulate_result(self))

    def _repr_html_(self) -> str:
        return _tabulate_result(self).to_html()

    @checked
    def save(self, folder: str | os.PathLike[str], *, program: bool = False) -> None:
        """Write weights (safetensors), plan.json, recipe.yaml and a model card; `intrafusion.load` reads them.

        Where the network is one of the zoo, torchvision, timm or transformers, the folder says so, and loads alone.

        Args:
            program: write program.pt2 too, of `torch.export`, which runs without the class of the network: in
                evaluation mode, and on batches of every size where the network takes them.
        Raises:
            FolderError: the folder exists and was not written by intrafusion.
            ModelError: `torch.export` does not take the network; nothing is written.
        """
        told = {
            "restored": [asdict(step) for step in self.restored],
            "notes": list(self.notes),
            "rolled_back": dict(self.rolled_back),
        }
        made = {"repairs": self.repairs, "before": self.before, "after": self.after, "original": self.original}
        words = Words(_list_figures(self), [*map(str, self.restored), *self.notes])
        folders.save(self.model, self.plan, folder, inputs=self.inputs, program=program, told=told, words=words, **made)

    @checked
    def loading_line(self, folder: str | os.PathLike[str]) -> str:
        """The line of Python that loads what `save` wrote, in any directory and process.

        Where the class is defined in a function or a notebook, or needs arguments, these are left to be filled in.

        Raises:
            FolderError: it is not there.
        """
        return write_line_of(folder, folders.read_document(Path(folder)), type(unwrap(self.model)))


def _tabulate_result(small: Compressed) -> TextTable:
    """What was done to each group and against the loss, and what the user should know."""
    notes = [f"note: {note}" for note in dict.fromkeys(small.notes) if note not in small.plan.warnings]
    return tabulate_plan(small.plan, small.before, small.after, [*map(str, small.restored), *notes])


def _list_figures(small: Compressed) -> list[tuple[str, str]]:
    """What was measured, and both values in words."""
    changes = {"parameters": (small.before.params, small.after.params), "MACs": (small.before.macs, small.after.macs)}
    return [(name, size_change("", *sizes).strip()) for name, sizes in changes.items()]
