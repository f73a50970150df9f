"""Figures 5 and 8 to 14: how far do the outputs move from those of the original?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intrafusion.experiments.experiment import Experiment, Options
from intrafusion.experiments.method import ORIGINAL
from intrafusion.experiments.reduction import reduce, reductions
from intrafusion.experiments.subject import WHOLE, Subject, wanted_groups
from intrafusion.measure.drift import drift, histogram, outputs

BINS = 120
REACH = 4.0  # the last bin ends at this many times the longest output of the original


def settings(subject: Subject, options: Options) -> Iterator[dict[str, Any]]:
    groups = wanted_groups(subject, options.group)
    wanted = reductions(subject, options, groups if options.group else [WHOLE, *groups])
    return (setting for setting in wanted if setting["method"] != ORIGINAL)


def measure(subject: Subject, setting: dict[str, Any]) -> dict[str, Any]:
    """Distances in the unit of the outputs; bins are the same for all reductions of one network."""
    small, found = reduce(subject, setting)
    longest = float(outputs(subject.model, subject.test.images).norm(dim=1).max())
    edges = [REACH * longest * i / BINS for i in range(BINS + 1)]
    distances = drift(small.model, subject.model, subject.test.images)
    return {
        "mean": float(distances.mean()),
        "median": float(distances.median()),
        "edges": edges,
        "counts": histogram(distances, edges),
        "accuracy": subject.accuracy(small.model),
        **found,
    }


OUTPUT_DRIFT = Experiment(
    title="distance of the outputs to the original's",
    settings=settings,
    measure=measure,
    defaults=Options(keep=(0.9, 0.7, 0.5)),
    uses=frozenset({"keep", "criterion", "method", "group", "order"}),
)
