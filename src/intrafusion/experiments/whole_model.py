"""All groups at once: accuracy against size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intrafusion.experiments.experiment import Experiment, Options
from intrafusion.experiments.reduction import measure, reductions
from intrafusion.experiments.subject import WHOLE, Subject, wanted_groups


def settings(subject: Subject, options: Options) -> Iterator[dict[str, Any]]:
    return reductions(subject, options, wanted_groups(subject, options.group))


WHOLE_MODEL = Experiment(
    title="all groups at once: accuracy against size",
    settings=settings,
    measure=measure,
    defaults=Options(keep=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3), group=(WHOLE,)),
    uses=frozenset({"keep", "criterion", "method", "group", "order"}),
)
