"""Tables 10 ff.: each group alone, at several keeps, by several criteria: pruned and fused, no data, no training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intrafusion.lab.experiments.experiment import Experiment, Options
from intrafusion.lab.experiments.reduction import measure_reduction, reduction_settings
from intrafusion.lab.experiments.subject import Subject, select_groups


def _settings(subject: Subject, options: Options) -> Iterator[dict[str, Any]]:
    return reduction_settings(subject, options, select_groups(subject, options.group), data_free=True)


DATA_FREE = Experiment(
    title="each group alone, pruned and fused without data",
    settings=_settings,
    measure=measure_reduction,
    defaults=Options(keep=(0.9, 0.7, 0.5, 0.3), criterion=("l1", "l2")),
    uses=frozenset({"keep", "criterion", "method", "group", "order"}),
)
