"""One network at several sizes: what each costs and how far its outputs are off; carried out when it is looked at."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, overload

from torch import nn

from intrafusion.application import wrap_result
from intrafusion.arguments import checked
from intrafusion.asked import check_keep, check_target
from intrafusion.brief import show_briefly
from intrafusion.compressed import Compressed
from intrafusion.errors import ArgumentError, BudgetError, RecipeError, show, unknown_name
from intrafusion.inspection import inspect, make_workable, prepare_model
from intrafusion.io.atomic import atomic_file
from intrafusion.measure.closeness import say_where
from intrafusion.measure.comparison import percent
from intrafusion.measure.evaluate import Evaluate, Judge
from intrafusion.measure.size import Size
from intrafusion.network.batches import ImagesLike
from intrafusion.network.calibration_images import choose_inputs
from intrafusion.network.free_memory import MemoryLike
from intrafusion.network.inputs import ExampleInputs
from intrafusion.network.texts import Tokenizer
from intrafusion.network.wrappers import outside_inference
from intrafusion.pipeline import Prepared
from intrafusion.progress import ShowProgress, prefix_stages, report, show_progress, shows_progress
from intrafusion.recipe import Recipe
from intrafusion.smallest import FRACTIONS, bisect, check_ranks
from intrafusion.table import TextTable

SIZES = (0.9, 0.8, 0.7, 0.6, 0.5)
PICTURES = (".png", ".svg", ".pdf")
"""What a picture may be."""


@partial(checked, leaving=("sizes", "of", "evaluate", *Recipe.options()))
@outside_inference
@shows_progress("frontier")
def frontier(
    model: nn.Module,
    example_inputs: ExampleInputs,
    inputs: ImagesLike | None = None,
    sizes: Sequence[float | Mapping[str, float]] = SIZES,
    evaluate: Evaluate | None = None,
    *,
    of: str = "macs",
    images: ImagesLike | None = None,
    tokenizer: Tokenizer | None = None,
    memory: MemoryLike = None,
    progress: ShowProgress = None,
    **options: Any,
) -> Frontier:
    """Make a trained network smaller to several sizes at once: the network is traced, proved and looked at only once.

    What is found out once: the channel groups and their proof, the inputs that are made or held out, what is read of
    the channels, the order in which channels are kept (those of a smaller size are among those of a larger one), and
    how much cutting each group costs the outputs. What is done for each size: the choice of sizes, surgery, its proof,
    and the layers, which are solved for what they read there. That happens when a size is first looked at, and stays:
    where it is interrupted, what is finished is kept, and the rest goes on from there.

    Args:
        model: any eager PyTorch network; not modified.
        example_inputs: as `compress`.
        inputs, images, tokenizer, memory: as `compress`.
        sizes: fractions of the original's MACs, parameters or channels, in (0, 1]; or whole targets, such as
            {"macs": 0.6, "params": 0.5} or {"latency_ms": 3.0}.
        evaluate: of a network, such as its accuracy: a number for each size, and for the original; it is given a copy,
            in evaluation mode.
        of: what fractions are of: "macs" or "params", where to cut is then chosen; "channels": as `keep` of `compress`.
        options: as `compress`, but for `keep`, `target` and `inplace`.
    Returns:
        the sizes in their order; `print` carries all of them out, and shows what each costs and keeps.
    Raises:
        BudgetError: no sizes, one that is none, or twice the same.
        RecipeError: an option that does not exist, or that means nothing.
        ModelError: as `compress`.
    """
    judge = None if evaluate is None else Judge(evaluate)
    recipes = _read_sizes(sizes, of, options)
    first = recipes[0]
    first.refuse_foreign()
    core, example = make_workable(model), first.call_of(example_inputs)
    graph = inspect(prepare_model(core, first, example), example)
    prepared = Prepared.of(
        first, core, graph, example, choose_inputs(inputs, images), tokenizer=tokenizer, memory=memory
    )
    shared = _Shared(model, prepared.calibrated(first), judge)
    return Frontier(tuple(Point(recipe, shared, f"size {k + 1} of {len(recipes)}") for k, recipe in enumerate(recipes)))


def _read_sizes(sizes: Any, of: Any, options: Mapping[str, Any]) -> list[Recipe]:
    """A recipe for each size."""
    if not isinstance(of, str) or of not in FRACTIONS:
        raise BudgetError(f"of: {unknown_name('measure', of, FRACTIONS)}")
    if not isinstance(sizes, Sequence) or isinstance(sizes, str) or not sizes:
        raise BudgetError(f"sizes: expected fractions such as {SIZES}, got {show(sizes)}; give at least one.")
    for name in options:
        if name in ("keep", "target") or name not in Recipe.options():
            valid = {*Recipe.options()} - {"keep", "target"}
            hint = " Sizes are said in sizes=." if name in ("keep", "target") else ""
            raise RecipeError(f"frontier: {unknown_name('option', name, valid)}{hint}")
    said = [_read_size(size, of) for size in sizes]
    if not all(isinstance(size, Mapping) for size in sizes):
        check_ranks(options.get("ranks", False), of)
    for index, one in enumerate(said):
        if one in said[:index]:
            raise BudgetError(f"sizes: expected each size once, got {show(sizes[index])} twice; leave one out.")
    return [Recipe.of(**options, **one) for one in said]


def _read_size(size: Any, of: str) -> dict[str, Any]:
    """As a recipe says it."""
    if isinstance(size, Mapping):
        check_target(size)
        return {"target": dict(size)}
    check_keep(size)
    return {"keep": float(size)} if of == "channels" else {"target": {of: float(size)}}


@dataclass(frozen=True, eq=False)
class _Shared:
    """What all sizes of one network share."""

    original: nn.Module
    prepared: Prepared
    judge: Judge | None

    __repr__ = show_briefly

    @cached_property
    def score(self) -> float | None:
        return None if self.judge is None else self.judge.score(self.original, "the original network")


@dataclass(frozen=True, eq=False)
class Point:
    """One size of a network; what is asked of it carries it out, once.

    Attributes:
        recipe: what was asked for.
    """

    recipe: Recipe
    _shared: _Shared = field(repr=False)
    _stage: str = field(default="", repr=False)
    _done: list[Compressed] = field(default_factory=list, repr=False)

    @property
    @outside_inference
    def compressed(self) -> Compressed:
        """The smaller network, as `compress` gives it."""
        if not self._done:
            with show_progress(None, "frontier"), prefix_stages(self._stage):
                small = self._shared.prepared.carry_out(self.recipe)
            self._done.append(wrap_result(self._shared.original, small))
        return self._done[0]

    @property
    def is_done(self) -> bool:
        """Whether it was carried out."""
        return bool(self._done)

    @property
    def asked(self) -> str:
        """The size in words, such as "macs 0.5"."""
        target = self.recipe.target or {"channels": self.recipe.keep}
        return ", ".join(f"{kind} {value:g}" for kind, value in target.items() if isinstance(value, (int, float)))

    @property
    def model(self) -> nn.Module:
        return self.compressed.model

    @property
    def cost(self) -> Size:
        """Parameters and MACs."""
        return self.compressed.after

    @property
    def error(self) -> float | None:
        """The output error on inputs that the solver did not see, see `Closeness`; None where there are none."""
        found = self.compressed.comparison
        return None if found is None or found.held_out is None else found.held_out.after.error

    @property
    def agreement(self) -> float | None:
        """The share of labels that are the original's there."""
        found = self.compressed.comparison
        return None if found is None or found.held_out is None else found.held_out.after.agreement

    @cached_property
    def score(self) -> float | None:
        """What `evaluate` gives of it; None without."""
        judge = self._shared.judge
        return None if judge is None else judge.score(self.model, f"the network at {self.asked}")

    def __repr__(self) -> str:
        return f"Point({self.asked}; {'carried out' if self.is_done else 'not carried out yet'})"


@dataclass(frozen=True, eq=False)
class Frontier(Sequence[Point]):
    """Several sizes of one network, in the order in which they were asked for."""

    points: tuple[Point, ...]

    @overload
    def __getitem__(self, index: int) -> Point: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Point]: ...
    def __getitem__(self, index: int | slice) -> Point | Sequence[Point]:
        return self.points[index]

    def __len__(self) -> int:
        return len(self.points)

    @property
    def score(self) -> float | None:
        """What `evaluate` gives of the original; None without."""
        return self.points[0]._shared.score

    @checked
    @outside_inference
    @shows_progress("frontier")
    def carry_out(self, *, progress: ShowProgress = None) -> Frontier:
        """Carry out what was not yet; interrupted, it goes on from there when it is called again."""
        for index, point in enumerate(self.points):
            report("sizes", index, len(self))
            _ = point.compressed, point.score
        report("sizes", len(self), len(self))
        return self

    @checked
    def find_smallest(self, passes: Callable[[Point], Any]) -> Point | None:
        """The smallest size that passes, found in about log2 of their number of tries; None where the largest does not.

        Sizes are taken in the order of their MACs, and where one does not pass, no smaller one is tried. Only what is
        tried is carried out, but for targets that are no fractions of one kind, whose order is not known before.

        Args:
            passes: such as `lambda point: point.error < 0.1`.
        """
        ordered = self._order()
        passed = bisect(len(ordered), lambda index: passes(ordered[index]))
        return ordered[passed - 1] if passed else None

    def _order(self) -> list[Point]:
        """The largest first."""
        shares = [_find_share(point.recipe) for point in self.points]
        if len({kind for kind, _ in shares}) == 1 and shares[0][0]:
            places = sorted(range(len(self)), key=lambda k: -shares[k][1])
            return [self.points[k] for k in places]
        return sorted(self.points, key=lambda point: -point.cost.macs)

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table().to_html()

    def __repr__(self) -> str:
        return f"Frontier({sum(p.is_done for p in self)} of {len(self)} sizes are carried out; print it to see all)"

    def _table(self) -> TextTable:
        self.carry_out()
        shared, before = self.points[0]._shared, self.points[0].compressed.before
        header = ("size", "parameters", "MACs", "latency", "outputs differ by", "labels agree")
        whole = ("original", f"{before.params:,}", f"{before.macs:,}", "", "", "", *_show_score(self.score))
        rows = tuple(_list_cells(point) for point in self.points)
        header = header if shared.judge is None else (*header, "score")
        noticed = [] if shared.judge is None else [f"note: {text}" for text in shared.judge.notes]
        return TextTable(header, (whole, *rows), ("", *_tell_of(self.points), *noticed), numbers=True)

    @checked
    def draw(self, path: str | os.PathLike[str]) -> None:
        """A picture (.png, .svg or .pdf): the output error, or the score, against the share of the MACs.

        Raises:
            ArgumentError: another kind of file, or nothing was measured.
        """
        if Path(path).suffix not in PICTURES:
            raise ArgumentError(f"draw: expected a file in .png, .svg or .pdf, got {show(path)}; name it so.")
        self.carry_out()
        _draw(Path(path), self.points)


def _find_share(recipe: Recipe) -> tuple[str, float]:
    """Of what, and how much; ("", ...) for what is no single number."""
    if recipe.target is None:
        return ("channels", recipe.keep) if isinstance(recipe.keep, float) else ("", 0.0)
    return next(iter(recipe.target.items())) if len(recipe.target) == 1 else ("", 0.0)


def _list_cells(point: Point) -> tuple[str, ...]:
    before, after, found = point.compressed.before, point.cost, point.compressed.comparison
    times = "" if found is None or found.speedup is None else f"{1 / found.speedup:.0%}"
    return (
        point.asked,
        f"{after.params:,} ({after.params / max(before.params, 1):.1%})",
        f"{after.macs:,} ({after.macs / max(before.macs, 1):.1%})",
        times,
        "" if point.error is None else percent(point.error),
        "" if point.agreement is None else percent(point.agreement),
        *_show_score(point.score),
    )


def _show_score(score: float | None) -> tuple[str, ...]:
    return () if score is None else (f"{score:.4g}",)


def _tell_of(points: Sequence[Point]) -> list[str]:
    """On what the outputs were compared, and what the user should know, once."""
    held = [found.held_out for p in points if (found := p.compressed.comparison) is not None and found.held_out]
    said = []
    if held:
        where = say_where(held[0].on, held[0].unseen)
        said.append(f"outputs: mean squared difference as a share of their variance, {where}")
    warnings = [f"{p.asked}: {w}" for p in points for w in p.compressed.warnings if "noticeably faster" not in w]
    rounded = [w for p in points for w in p.compressed.plan.warnings if "round_to=1" in w][:1]
    return [*said, *(f"warning: {text}" for text in warnings), *(f"note: {text}" for text in rounded)]


def _draw(path: Path, points: Sequence[Point]) -> None:
    from matplotlib.figure import Figure

    scored = all(point.score is not None for point in points)
    value = (lambda p: p.score) if scored else (lambda p: p.error)
    shown = [(p, v) for p in points if (v := value(p)) is not None]
    if not shown:
        raise ArgumentError("draw: expected sizes that were measured; give inputs of which some can be held out.")
    shown.sort(key=lambda pair: pair[0].cost.macs)
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    share = [100 * p.cost.macs / max(p.compressed.before.macs, 1) for p, _ in shown]
    axes.plot(share, [v for _, v in shown], color="#1f5f99", linewidth=2, marker="o", markersize=5)
    original = points[0]._shared.score if scored else 0.0
    if original is not None:
        axes.axhline(original, color="#666666", linewidth=1.2, linestyle=(0, (5, 3)))
        axes.annotate("original", (min(share), original), (0, 4), textcoords="offset points", color="#666666")
    for (point, v), x in zip(shown, share, strict=True):
        axes.annotate(point.asked, (x, v), (4, 4), textcoords="offset points", fontsize=8, color="#666666")
    axes.set(xlabel="MACs (% of the original's)", ylabel="score" if scored else "output error on unseen inputs")
    axes.invert_xaxis()
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary)
