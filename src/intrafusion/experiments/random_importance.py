"""Table 5: does fusing still help where the channels to keep are drawn at random?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intrafusion.experiments.experiment import Experiment, Options
from intrafusion.experiments.reduction import measure, reductions
from intrafusion.experiments.subject import WHOLE, Subject, wanted_groups


def settings(subject: Subject, options: Options) -> Iterator[dict[str, Any]]:
    groups = wanted_groups(subject, options.group)
    return reductions(subject, options, groups if options.group else [WHOLE, *groups])


RANDOM_IMPORTANCE = Experiment(
    title="channels to keep drawn at random",
    settings=settings,
    measure=measure,
    defaults=Options(keep=(0.9, 0.7), criterion=("random",), seeds=5),
    uses=frozenset({"keep", "method", "group", "order", "seeds"}),
)
