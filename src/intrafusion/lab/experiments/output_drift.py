"""Figures 5 and 8 to 14: how far do the outputs move from those of the original?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intrafusion.lab.bench.records import ORIGINAL, WHOLE
from intrafusion.lab.experiments.experiment import Experiment, Options
from intrafusion.lab.experiments.reduction import reduce_subject, reduction_settings
from intrafusion.lab.experiments.subject import Subject, select_groups
from intrafusion.measure.drift import drift, histogram, output_rows

_BINS = 120
_REACH = 4.0  # the last bin ends at this many times the longest output of the original


def _settings(subject: Subject, options: Options) -> Iterator[dict[str, Any]]:
    groups = select_groups(subject, options.group)
    wanted = reduction_settings(subject, options, groups if options.group else [WHOLE, *groups])
    return (setting for setting in wanted if setting["method"] != ORIGINAL)


def _measure(subject: Subject, setting: dict[str, Any]) -> dict[str, Any]:
    """Distances in the unit of the outputs; bins are the same for all reductions of one network."""
    small, found = reduce_subject(subject, setting)
    longest = float(output_rows(subject.model, subject.test.images).norm(dim=1).max())
    edges = [_REACH * longest * i / _BINS for i in range(_BINS + 1)]
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
    settings=_settings,
    measure=_measure,
    defaults=Options(keep=(0.9, 0.7, 0.5)),
    uses=frozenset({"keep", "criterion", "method", "group", "order"}),
)
