"""Compressed: what was obtained, and what is printed of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from intrafusion.arguments import Count, checked
from intrafusion.brief import show_briefly
from intrafusion.io import folder as folders
from intrafusion.io.card import Words
from intrafusion.io.export import Exported, export_inputs
from intrafusion.io.line import write_line_of
from intrafusion.measure.closeness import OUTPUT_ERROR, Closeness, say_where
from intrafusion.measure.comparison import Comparison, describe_change
from intrafusion.measure.size import Size
from intrafusion.measure.trials import Trials
from intrafusion.names import name_some
from intrafusion.network.identity import Identity
from intrafusion.network.input_batches import Batches
from intrafusion.network.inputs import Inputs
from intrafusion.network.wrappers import unwrap
from intrafusion.plan import Plan, is_miss, name_rank_group, tabulate_plan
from intrafusion.surgery.write import Repair
from intrafusion.table import TextTable, find_width, lay_out_figures, show_lines, wrap_text


@dataclass(frozen=True)
class Restoration:
    """One step against the loss: what was done, on what, how long it took and what it gained.

    Attributes:
        step: name of the restorer.
        on: the images it was done on, None for none.
        seconds: images made from the network included.
        error_before: mean squared difference of the outputs to the original's, as a fraction of the variance of the
            original's, of several outputs the largest; None where it was not measured.
        error_after: the same after the step.
        note: why not something better, where it was chosen automatically; what was undone.
        measured_on: the images that both errors are of.
        unseen: whether these were kept from the solver.
        agreement_before, agreement_after: share of the labels that are the original's; see `Closeness`.
        outputs_before, outputs_after: the errors of several outputs by name; see `Closeness`.
        undone: whether the weights from before the step were put back, as the errors say that it did harm.
    """

    step: str
    on: str | None
    seconds: float
    error_before: float | None = None
    error_after: float | None = None
    note: str | None = None
    measured_on: str | None = None
    unseen: bool = False
    agreement_before: float | None = None
    agreement_after: float | None = None
    undone: bool = False
    outputs_before: Mapping[str, float] = field(default_factory=dict)
    outputs_after: Mapping[str, float] = field(default_factory=dict)

    @property
    def result(self) -> tuple[Closeness, Closeness] | None:
        """How close the outputs were before the step and are behind it; None where that was not measured."""
        if self.error_before is None or self.error_after is None:
            return None
        before = Closeness(self.error_before, self.agreement_before, self.outputs_before)
        after = Closeness(self.error_after, self.agreement_after, self.outputs_after)
        return before, before if self.undone else after

    __repr__ = show_briefly

    def __str__(self) -> str:
        on = f" on {self.on}" if self.on else ""
        gain = "" if self.error_after is None else f", output error {self.error_before:.2g} -> {self.error_after:.2g}"
        where = f" {say_where(self.measured_on, self.unseen)}" if gain and self.measured_on else ""
        note = f" ({self.note})" if self.note else ""
        return f"restored: {self.step}{on}, {self.seconds:.1f} s{gain}{where}{note}"


@checked
@dataclass(frozen=True, eq=False)
class Compressed:
    """The smaller network, the plan that was carried out, and its size before and after.

    Attributes:
        plan: what was done to each group, and why where nothing was.
        inputs: one call of the network, as it was given.
        repairs: attributes of modules that had to follow the new sizes.
        restored: what was done against the loss, in order.
        images: what the layers were solved on, in batches, if anything.
        notes: what the user should know, such as a budget that could not be met.
        rolled_back: groups that were to be reduced and could not be, with the reason.
        original: what tells the original from other networks.
        comparison: what both networks take, and how close their outputs are; None where only a plan was carried out.
        trials: the sizes that were tried, where the smallest was looked for that loses little enough.
    """

    model: nn.Module
    plan: Plan
    before: Size
    after: Size
    inputs: Inputs
    repairs: tuple[Repair, ...] = ()
    restored: tuple[Restoration, ...] = ()
    images: Batches | None = None
    notes: tuple[str, ...] = ()
    rolled_back: Mapping[str, str] = field(default_factory=dict)
    original: Identity | None = None
    comparison: Comparison | None = None
    trials: Trials | None = None

    __repr__ = show_briefly

    def __str__(self) -> str:
        tables = (part for table in self._tables() for part in ("", str(table)))
        return "\n".join([*_summarise(self), *tables])

    def _repr_html_(self) -> str:
        figures = TextTable(("measured", "before -> after"), tuple(_list_figures(self)))
        head = show_lines([_title(self)]) + figures.to_html() + show_lines(_list_said(self))
        return head + "".join(table.to_html() for table in self._tables())

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Raises AttributeError, which says where it is if the network has it."""
            held = name[:1] != "_" and hasattr(self.__dict__.get("model"), name)
            there = f"; the network has it: .model.{name}" if held else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{there}")

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against using the smaller network as it is; `print` shows it."""
        return tuple(_list_warnings(self))

    def _headline(self) -> str:
        """What was done, in half a sentence."""
        between = {name_rank_group(name) for name in self.plan.split}
        groups = [d for d in self.plan.decisions if d.group not in between]
        fewer = f"{sum(d.reduced for d in groups)} of {len(groups)} channel groups are smaller"
        layers = f"{len(between)} layer{'s are two' if len(between) > 1 else ' is two'} of lower rank"
        return f"{fewer}, {layers}" if between else fewer

    def _tables(self) -> tuple[TextTable, ...]:
        """What was done to each part; without the warnings, which stand above."""
        told = any(step.error_after is not None for step in self.restored)
        below = [f"output error: {OUTPUT_ERROR}"] if told else []
        return (tabulate_plan(replace(self.plan, warnings=_list_plan_notes(self.plan)), below=below),)

    @checked
    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        program: bool = False,
        pretrained: str | os.PathLike[str] | None = None,
    ) -> None:
        """Write weights (safetensors), plan.json, recipe.yaml and a model card; `intrafusion.load` reads them.

        Where the network is one of the zoo, torchvision, timm or transformers, the folder says so, and loads alone.

        Args:
            program: write program.pt2 too, of `torch.export`, which runs without the class of the network: in
                evaluation mode, and on batches of every size where the network takes them.
            pretrained: folder of the original in the format of Hugging Face. The new folder has that format too:
                `from_pretrained` opens it, which is tried; tokenizer and other files are copied.
        Raises:
            FolderError: the folder exists and was not written by intrafusion.
            ModelError: `torch.export` does not take the network, or no configuration says its sizes for
                `from_pretrained`; nothing is written.
        """
        told = {
            "restored": [asdict(step) for step in self.restored],
            "notes": list(self.notes),
            "rolled_back": dict(self.rolled_back),
            "comparison": None if self.comparison is None else self.comparison.to_data(),
            "inputs": self.inputs.shapes(),
            "trials": None if self.trials is None else self.trials.to_data(),
        }
        made = {"repairs": self.repairs, "before": self.before, "after": self.after, "original": self.original}
        tried = None if self.trials is None else self.trials.table()
        words = Words(_list_figures(self), [*map(str, self.restored), *_label(self.warnings), *self.notes], tried)
        made |= {"program": program, "pretrained": None if pretrained is None else Path(pretrained)}
        folders.save(self.model, self.plan, folder, inputs=self.inputs, told=told, words=words, **made)

    @checked
    def export(self, path: str | os.PathLike[str], *, opset: Count | None = None, overwrite: bool = False) -> Exported:
        """Write the smaller network as one file that runs without its class, and check it; see `intrafusion.export`.

        Of several outputs those that mattered to the compression (`outputs=`) are in it.

        Args:
            path: ends in `.onnx` (needs `intrafusion[onnx]`) or in `.pt2`.
            opset: version of ONNX's operators, 20 if not said.
            overwrite: whether a file of that name may be replaced.
        Raises:
            ArgumentError, FolderError, ModelError: as of `intrafusion.export`; nothing is written.
        """
        return export_inputs(self.model, self.inputs, Path(path), opset=opset, overwrite=overwrite)

    @checked
    def loading_line(self, folder: str | os.PathLike[str]) -> str:
        """The line of Python that loads what `save` wrote, in any directory and process.

        Where the class is defined in a function or a notebook, or needs arguments, these are left to be filled in.

        Raises:
            FolderError: it is not there.
        """
        return write_line_of(folder, folders.read_document(Path(folder)), type(unwrap(self.model)))


# ---- what is printed before the table -------------------------------------------------------------------------------

_ALIGNED = (8, 16)  # multiples that hardware likes


def _summarise(small: Compressed) -> list[str]:
    """Size, time and outputs before and after, what was done against the loss, and what the user should know."""
    return [*wrap_text(_title(small), find_width()), *lay_out_figures(_list_figures(small), _list_said(small))]


def _title(small: Compressed) -> str:
    return f"{type(small.model).__name__}: {small._headline()}"


def _list_said(small: Compressed) -> list[str]:
    """What was done against the loss, and what the user should know."""
    said = [*map(str, small.restored), *_label(small.warnings)]
    return said + [f"note: {note}" for note in dict.fromkeys(small.notes) if note not in small.plan.warnings]


def _label(warnings: Iterable[str]) -> Iterator[str]:
    return (f"warning: {text}" for text in warnings)


def _list_plan_notes(plan: Plan) -> tuple[str, ...]:
    return tuple(text for text in plan.warnings if not is_miss(text))


def _list_figures(small: Compressed) -> list[tuple[str, str]]:
    """What was measured, and both values in words."""
    if small.comparison is not None:
        return [*small.comparison.figures(), *([small.trials.row()] if small.trials else [])]
    before, after = small.before, small.after
    if before == after:
        return [("parameters", f"{before.params:,}"), ("MACs", f"{before.macs:,}")]
    return [
        ("parameters", describe_change(before.params, after.params)),
        ("MACs", describe_change(before.macs, after.macs)),
    ]


def _list_warnings(small: Compressed) -> Iterator[str]:
    yield from filter(is_miss, small.plan.warnings)
    if small.rolled_back:
        yield f"rolled back: {name_some(tuple(small.rolled_back))}; the table says why."
    found = small.comparison
    if found is None:
        return
    if found.failed is not None:
        yield found.failed
    if found.is_faster is False:
        yield f"the smaller network is not noticeably faster here. {_advise_on_speed(small.plan)}"


def _advise_on_speed(plan: Plan) -> str:
    """Rounded sizes where they are not round, else a budget that measures."""
    base = _ALIGNED[0]
    cut = [d for d in plan.decisions if d.reduced and d.n >= 2 * base]
    odd = [d for d in cut if d.m % base]
    if odd:
        counts = f"{len(odd)} of {len(cut)} sizes are no multiples of {base}"
        return f"{counts}, the shapes that hardware likes: round_to={base} may help, or {_ALIGNED[1]} on a GPU."
    return "Time a larger batch, or say target={'latency_ms': ...}, which cuts where it is measured to help."
