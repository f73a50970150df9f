"""Figures 6 and 15 to 18: accuracy over the plane through the original, the pruned and the fused weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch.nn.functional as F
from torch import nn

from intrafusion.errors import ArgumentError
from intrafusion.lab.bench.records import ORIGINAL, WHOLE
from intrafusion.lab.experiments.experiment import Experiment, Options
from intrafusion.lab.experiments.method import spell_ours
from intrafusion.lab.experiments.reduction import reduce_subject, reduction_settings
from intrafusion.lab.experiments.subject import Subject, select_groups
from intrafusion.measure.drift import output_rows
from intrafusion.measure.landscape import Plane, copy_with_tensors, embed_network, fold_tensors, match_places


def _settings(subject: Subject, options: Options) -> Iterator[dict[str, Any]]:
    """One for each row of the grid, so that a kill loses a row at most.

    Raises:
        ArgumentError: not exactly two methods, or fewer than two points.
    """
    if len(options.method) != 2 or options.points < 2:
        raise ArgumentError(
            f"landscape: expected two methods to span the plane with the original and at least 2 points, "
            f"got {len(options.method)} and {options.points}."
        )
    spanning = replace(options, method=options.method[:1])
    for setting in reduction_settings(subject, spanning, select_groups(subject, options.group)):
        if setting["method"] != ORIGINAL:
            images = subject.train is not None
            both = [spell_ours(method, images=images) for method in options.method]
            plane = {**setting, "method": " | ".join(both), "points": options.points}
            yield from ({**plane, "row": row} for row in range(options.points))


def _measure(subject: Subject, setting: dict[str, Any]) -> dict[str, Any]:
    """Accuracy and mean cross-entropy along one row; x and y are distances in weight space, batch norms folded."""
    plane, recipes = plane_of(subject, **{k: v for k, v in setting.items() if k not in ("row", *subject.setting)})
    xs, ys = plane.axes(setting["points"])
    y = ys[setting["row"]]
    found = [quality(subject, copy_with_tensors(subject.model, plane.at(x, y))) for x in xs]
    return {
        "y": y,
        "x": xs,
        "accuracy": [accuracy for accuracy, _ in found],
        "loss": [loss for _, loss in found],
        "corners": [list(corner) for corner in plane.corners],
        "corner_names": [ORIGINAL, *setting["method"].split(" | ")],
        "recipe": recipes[1],
    }


@lru_cache(maxsize=1)
def plane_of(subject: Subject, *, method: str, points: int, **setting: Any) -> tuple[Plane, list[str]]:
    """The plane, and the recipes of its two smaller networks; the same for all rows."""
    made = [reduce_subject(subject, {**setting, "method": text}) for text in method.split(" | ")]
    chosen = [match_places(made[0][0].plan.maps)]
    chosen.append(match_places(made[1][0].plan.maps, made[0][0].plan.maps))
    wide = [
        embed_network(subject.model, small.model, subject.graph, where, subject.inputs)
        for (small, _), where in zip(made, chosen, strict=True)
    ]
    plane = Plane.through(fold_tensors(subject.model, subject.graph), wide[0], wide[1])
    return plane, [found["recipe"] for _, found in made]


def quality(subject: Subject, model: nn.Module) -> tuple[float, float]:
    """Accuracy in [0, 1], and mean cross-entropy in nats."""
    scores = output_rows(model, subject.test.images)
    right = (scores.argmax(1) == subject.test.labels).double().mean()
    return float(right), float(F.cross_entropy(scores, subject.test.labels))


LANDSCAPE = Experiment(
    title="accuracy over the plane through original, pruned and fused weights",
    settings=_settings,
    measure=_measure,
    defaults=Options(keep=(0.7,), method=("select", "intrafusion"), group=(WHOLE,), points=15),
    uses=frozenset({"keep", "criterion", "method", "group", "order", "points"}),
)
