"""Draw a picture for each stage of the pipeline, from a run on the zoo's digits network: no data but scikit-learn's.

python docs/pictures/draw_stages.py             all of them, beside this file
python docs/pictures/draw_stages.py reduce      some
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import intrafusion
from intrafusion.importance import Observation, get_importance
from intrafusion.lab import zoo
from intrafusion.lab.report.plot import COLOURS, FAINT, GREY, INK, drawing
from intrafusion.network.double import output_difference
from intrafusion.network.tensors import named_tensors
from intrafusion.planning import fold_weights
from intrafusion.reduce import ReductionMap
from intrafusion.surgery.maps import reduce_weights
from intrafusion.surgery.operate import TOLERANCE
from intrafusion.surgery.proof import FunctionCheck

NETWORK, IMAGES, MACS = "digits_resnet", 256, 0.5
ORANGE, BLUE, GREEN, _ = COLOURS
LAYER = "layer1.0.conv1"  # of which channels are shown


class Run:
    """The digits network, and what was done with it; each part when it is first asked for."""

    @cached_property
    def model(self) -> nn.Module:
        return zoo.train_digits()

    @cached_property
    def example(self) -> Tensor:
        return zoo.example_input(NETWORK)

    @cached_property
    def images(self) -> Tensor:
        return zoo.load_data(NETWORK, "train", limit=IMAGES).images

    @cached_property
    def unseen(self) -> zoo.Images:
        return zoo.load_data(NETWORK, "test")

    @cached_property
    def graph(self) -> intrafusion.ChannelGraph:
        return intrafusion.inspect(self.model, self.example, progress=False)

    @cached_property
    def small(self) -> intrafusion.Compressed:
        return self.compress(target={"macs": MACS})

    def compress(self, **options: Any) -> intrafusion.Compressed:
        return intrafusion.compress(self.model, self.example, inputs=self.images, progress=False, **options)


def draw_pipeline(run: Run, path: Path) -> None:
    """Boxes from left to right, with what each stage found."""
    small, graph = run.small, run.graph
    found = small.comparison.held_out
    cut = [d for d in small.plan.decisions if d.reduced]
    proofs = Counter(d.proof for d in cut)
    stages = {
        "trace": f"{len(graph.groups)} groups of\nchannels",
        "verify": f"{len(graph.reducible)} may be cut;\noutputs stay",
        "budget": f"{MACS:.0%} of the MACs:\n{len(cut)} groups shrink",
        "reduce": f"{sum(d.n for d in cut)} channels\nbecome {sum(d.m for d in cut)}",
        "apply, prove": f"{proofs['function']} proved by\nfunction",
        "restore": f"output error\n{found.before.error:.2f} to {found.after.error:.3f}",
        "save, export": f"{small.before.params:,} to\n{small.after.params:,} numbers",
    }
    with drawing(path, (9.4, 1.9)) as figure:
        axes = _start_sketch(figure, len(stages), 1.15)
        for place, (name, words) in enumerate(stages.items()):
            _draw_box(axes, place, 0.85, name, BLUE)
            axes.text(place, 0.32, words, ha="center", va="center", fontsize=8, color=GREY)
            if place:
                _draw_arrow(axes, (place - 0.6, 0.85), (place - 0.43, 0.85))
        axes.text(1, -0.14, "else: left alone, with the reason", ha="center", fontsize=8, color=ORANGE)
        axes.text(4, -0.14, "else: rolled back, with the reason", ha="center", fontsize=8, color=ORANGE)


def draw_solving(_: Run, path: Path) -> None:
    """What the layers of the smaller network read, and what they are solved for."""
    with drawing(path, (8.2, 2.2)) as figure:
        axes = _start_sketch(figure, 3, 1.3)
        for place in range(3):
            _draw_box(axes, place, 1.05, f"layer {place + 1}", GREY)
            _draw_box(axes, place, 0.1, f"layer {place + 1}, solved", BLUE)
            merge = "" if place == 2 else f"M{place + 1} "
            _draw_arrow(axes, (place, 0.92), (place, 0.25), colour=ORANGE)
            axes.text(place + 0.03, 0.58, f"solved for {merge}y{place + 1}", fontsize=8, color=ORANGE, va="center")
            if place:
                _draw_arrow(axes, (place - 0.62, 1.05), (place - 0.28, 1.05))
                _draw_arrow(axes, (place - 0.62, 0.1), (place - 0.28, 0.1))
                axes.text(place - 0.46, 1.12, f"y{place}", ha="center", fontsize=8, color=GREY)
                axes.text(place - 0.46, 0.17, f"x{place + 1}, as it\nis now", ha="center", fontsize=8, color=GREY)
        axes.text(-0.55, 1.05, "original", ha="right", va="center", color=INK)
        axes.text(-0.55, 0.1, "smaller", ha="right", va="center", color=INK)


def _start_sketch(figure: Any, count: int, height: float) -> Any:
    axes = figure.subplots()
    axes.set(xlim=(-1.0 if count == 3 else -0.6, count - 0.4), ylim=(-0.25, height))
    axes.set_axis_off()
    return axes


def _draw_box(axes: Any, x: float, y: float, words: str, colour: str) -> None:
    box = {"boxstyle": "round,pad=0.45", "facecolor": "none", "edgecolor": colour, "linewidth": 1.6}
    axes.text(x, y, words, ha="center", va="center", fontsize=9, color=INK, bbox=box)


def _draw_arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str = GREY) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.2})


def draw_importance(run: Run, path: Path) -> None:
    """Scores of the channels of one group, those that are kept at half of them in colour."""
    group = run.graph[LAYER]
    weights = fold_weights(run.model, run.graph, ())
    names = ("l2", "fpgm", "bn_scale")
    with drawing(path, (8.2, 2.6)) as figure:
        for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
            scores = get_importance(name)(group, weights, _observe(run, group)).double()
            scores = scores / scores.max()
            kept = scores.argsort(descending=True)[: group.size // 2].tolist()
            colours = [BLUE if c in kept else FAINT for c in range(group.size)]
            axes.bar(range(group.size), scores.tolist(), color=colours, width=0.85)
            axes.set(title=name, xlabel=f"channel of {LAYER}", yticks=[0, 1])
        figure.axes[0].set_ylabel("score, largest = 1")


def _observe(run: Run, group: intrafusion.ChannelGroup) -> Any:
    tensors = {m.tensor: run.model.get_parameter(m.tensor).detach() for m in group.members if "running" not in m.tensor}
    return Observation(tensors=tensors)


def draw_budget(run: Run, path: Path) -> None:
    """Sizes for a target beside the even cut of as many multiply-accumulates, with what each leaves undone."""
    target = run.small
    even = next(s for k in range(95, 5, -1) if (s := run.compress(keep=k / 100)).after.macs <= target.after.macs)
    groups = [d for d in target.plan.decisions if d.depth is not None]
    with drawing(path, (8.2, 3.0)) as figure:
        axes = figure.subplots()
        places = torch.arange(len(groups)).double()
        sizes = {s: {d.group: d.m for d in s.plan.decisions} for s in (target, even)}
        rows = ((None, "whole", FAINT), (target, "target", BLUE), (even, "even", ORANGE))
        for row, (small, words, colour) in enumerate(rows):
            heights = [d.n if small is None else sizes[small][d.group] for d in groups]
            error = "" if small is None else f", output error {small.comparison.held_out.after.error:.3f}"
            bars = axes.bar((places + 0.28 * (row - 1)).tolist(), heights, 0.27, color=colour, label=f"{words}{error}")
            axes.bar_label(bars, fontsize=8, color=GREY)
        axes.set_xticks(
            places.tolist(), [d.group.replace(".downsample.0", ".\ndownsample.0") for d in groups], fontsize=8
        )
        axes.set(ylabel="channels", title=f"{MACS:.0%} of the multiply-accumulates of {NETWORK}, {IMAGES} images")
        axes.legend(loc="upper left", fontsize=8)


def draw_reduce(run: Run, path: Path) -> None:
    """Merge and unmerge of one group of 16 channels by each reducer: 16 -> 6."""
    group, keep = LAYER, 6 / 16
    names = ("select", "intrafusion", "fold", "pivot")
    with drawing(path, (8.2, 2.5)) as figure:
        for column, name in enumerate(names):
            plan = run.compress(keep={group: keep, "*": 1.0}, reducer=name, restore=None).plan
            maps = plan.maps[group]
            for row, (words, matrix) in enumerate((("M", maps.merge), ("U'", maps.unmerge.T))):
                axes = figure.add_subplot(2, len(names), 1 + column + row * len(names))
                _show_matrix(axes, matrix)
                axes.set_title(f"{name}: {words}", fontsize=10)
                if column == 0:
                    axes.set_ylabel("new channel", fontsize=8)
                if row == 1:
                    axes.set_xlabel("old channel", fontsize=8)


def _show_matrix(axes: Any, matrix: Tensor) -> None:
    """A square for each number: its area is the size, its colour the sign."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    largest = float(matrix.abs().max())
    for sign, colour in ((1, BLUE), (-1, ORANGE)):
        squares = []
        for i, j in (sign * matrix > 0.03 * largest).nonzero().tolist():
            side = 0.92 * math.sqrt(abs(float(matrix[i, j])) / largest)
            squares.append(Rectangle((j - side / 2, i - side / 2), side, side))
        axes.add_collection(PatchCollection(squares, facecolor=colour, edgecolor="none"))
    m, n = matrix.shape
    axes.set(xlim=(-0.6, n - 0.4), ylim=(m - 0.4, -0.6), xticks=[0, n - 1], yticks=[0, m - 1], aspect="equal")
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(True)


def draw_proof(run: Run, path: Path) -> None:
    """Errors that proofs let pass, and those of claims that are wrong, on one scale."""
    with _note_compared() as compared:
        run.compress(keep=0.5, restore=None)
    groups = run.graph.reducible
    rows = {
        "channels of a group\npermuted": ([_permute(run, g) for g in groups], BLUE),
        "smaller network against\nthe original at full width": (compared, BLUE),
        "permuted, one member\nof the group forgotten": (
            [_permute(run, replace(g, members=g.members[1:])) for g in groups],
            ORANGE,
        ),
    }
    with drawing(path, (8.2, 2.4)) as figure:
        axes = figure.subplots()
        for place, (values, colour) in enumerate(rows.values()):
            axes.scatter([max(v, 1e-17) for v in values], [place] * len(values), color=colour, s=36, alpha=0.8)
        axes.axvline(TOLERANCE, color=GREY, linestyle=(0, (5, 3)))
        axes.text(TOLERANCE, -0.62, "  left alone, or rolled back", color=GREY, fontsize=8, va="center")
        axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
        axes.set(xscale="log", xlabel="relative difference of the outputs, float64", ylim=(2.5, -0.9))
        axes.grid(axis="x")


@contextlib.contextmanager
def _note_compared() -> Iterator[list[float]]:
    """A list that fills with the errors that proofs of function are handed."""
    noted: list[float] = []
    passes = FunctionCheck.passes

    def note(self: FunctionCheck, error: float) -> bool:
        noted.append(error)
        return passes(self, error)

    FunctionCheck.passes = note
    try:
        yield noted
    finally:
        FunctionCheck.passes = passes


def _permute(run: Run, group: intrafusion.ChannelGroup) -> float:
    """How far the outputs move when the channels of this group change places, wherever it says that they are."""
    graph = replace(run.graph, groups=tuple(group if g.name == group.name else g for g in run.graph.groups))
    places = torch.randperm(group.size, generator=torch.Generator().manual_seed(0))
    turned = torch.eye(group.size, dtype=torch.float64)[places]
    double = copy.deepcopy(run.model).double()
    tensors = {name: t.detach() for name, t in named_tensors(double).items()}
    changed = reduce_weights(tensors, graph, {group.name: ReductionMap(turned, turned.T)})
    images = run.images.double()
    with torch.no_grad():
        expected = double(images)
        for name, tensor in changed.items():
            tensors[name].copy_(tensor)
        return output_difference([double(images)], [expected])


def draw_restore(run: Run, path: Path) -> None:
    """How far the stream is from the original's along the network, before the layers are solved and after."""
    cut = run.compress(keep=0.5, restore=None).model
    solved = run.compress(keep=0.5).model
    noise = intrafusion.compress(run.model, run.example, keep=0.5, restore="noise", progress=False).model
    with drawing(path, (8.2, 3.0)) as figure:
        axes = figure.subplots()
        for model, words, colour in (
            (cut, "cut, not restored", GREY),
            (noise, "solved on noise", ORANGE),
            (solved, f"solved on {IMAGES} images", BLUE),
        ):
            errors = _measure_along(run, model)
            axes.plot(list(errors), list(errors.values()), color=colour, marker="o", label=words)
        axes.set(ylabel="error / variance", ylim=(0, None), title=f"{NETWORK} at keep 0.5, 360 digits that nothing saw")
        axes.grid(axis="y")
        axes.legend(fontsize=9)


def _measure_along(run: Run, small: nn.Module) -> dict[str, float]:
    """Mean squared error, as a share of the variance, of the original's outputs told from what each place holds."""
    images = run.unseen.images
    places = ("conv1", "layer1", "layer2", "layer3", "fc")
    theirs, ours = _record(run.model, images, places), _record(small, images, places)
    return {name: _explain(ours[name], theirs[name]) for name in places}


def _record(model: nn.Module, images: Tensor, places: tuple[str, ...]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(n).register_forward_hook(lambda _m, _i, out, n=n: seen.__setitem__(n, out.double()))
        for n in places
    ]
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    return seen


def _explain(ours: Tensor, theirs: Tensor) -> float:
    """What the best affine map of our channels leaves of theirs; at the output, the difference itself."""
    if ours.shape == theirs.shape and ours.dim() == 2:
        return float((ours - theirs).square().sum() / (theirs - theirs.mean(0)).square().sum())
    rows, wanted = (t.movedim(1, -1).flatten(0, -2) for t in (ours, theirs))
    rows, wanted = rows - rows.mean(0), wanted - wanted.mean(0)
    left = wanted - rows @ torch.linalg.lstsq(rows, wanted).solution
    return float(left.square().sum() / wanted.square().sum())


def draw_saving(run: Run, path: Path) -> None:
    """Bytes of the files of the folder, beside those of the original's weights."""
    with tempfile.TemporaryDirectory() as place:
        run.small.save(Path(place) / "small", program=True)
        sizes = {p.name: p.stat().st_size for p in sorted((Path(place) / "small").iterdir())}
    whole = sum(t.numel() * t.element_size() for t in run.model.state_dict().values())
    rows = {"weights of the original": whole, **dict(sorted(sizes.items(), key=lambda item: -item[1]))}
    with drawing(path, (8.2, 2.4)) as figure:
        axes = figure.subplots()
        colours = [GREY] + [BLUE if name == "model.safetensors" else GREEN for name in sizes]
        bars = axes.barh(list(rows), [size / 1e3 for size in rows.values()], color=colours)
        axes.bar_label(bars, [f" {size / 1e3:,.1f} kB" for size in rows.values()], color=INK, fontsize=9)
        axes.invert_yaxis()
        axes.set(xlabel="kB", title=f"mynet-small/: {NETWORK} at {MACS:.0%} of its multiply-accumulates")


STAGES: Mapping[str, Callable[[Run, Path], None]] = {
    "pipeline": draw_pipeline,
    "solving": draw_solving,
    "importance": draw_importance,
    "budget": draw_budget,
    "reduce": draw_reduce,
    "proof": draw_proof,
    "restore": draw_restore,
    "saving": draw_saving,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all by default")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = Run()
    for name, draw in STAGES.items():
        if not options.stages or name in options.stages:
            draw(run, options.folder / f"{name}.svg")


if __name__ == "__main__":
    main()
