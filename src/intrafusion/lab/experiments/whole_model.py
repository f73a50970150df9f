"""All groups at once: accuracy against size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intrafusion.lab.bench.records import WHOLE
from intrafusion.lab.experiments.experiment import Experiment, Options
from intrafusion.lab.experiments.reduction import measure_reduction, reduction_settings
from intrafusion.lab.experiments.subject import Subject, select_groups


def _settings(subject: Subject, options: Options) -> Iterator[dict[str, Any]]:
    return reduction_settings(subject, options, select_groups(subject, options.group))


WHOLE_MODEL = Experiment(
    title="all groups at once: accuracy against size",
    settings=_settings,
    measure=measure_reduction,
    defaults=Options(keep=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3), group=(WHOLE,)),
    uses=frozenset({"keep", "criterion", "method", "group", "order"}),
)
