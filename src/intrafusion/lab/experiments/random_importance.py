"""Table 5: does fusing still help where the channels to keep are drawn at random?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intrafusion.lab.bench.records import WHOLE
from intrafusion.lab.experiments.experiment import Experiment, Options
from intrafusion.lab.experiments.reduction import measure_reduction, reduction_settings
from intrafusion.lab.experiments.subject import Subject, select_groups


def _settings(subject: Subject, options: Options) -> Iterator[dict[str, Any]]:
    groups = select_groups(subject, options.group)
    return reduction_settings(subject, options, groups if options.group else [WHOLE, *groups])


RANDOM_IMPORTANCE = Experiment(
    title="channels to keep drawn at random",
    settings=_settings,
    measure=measure_reduction,
    defaults=Options(keep=(0.9, 0.7), criterion=("random",), seeds=5),
    uses=frozenset({"keep", "method", "group", "order", "seeds"}),
)
