"""Figure 19 and Table 4: do the masses of the channels matter? Several trained networks, one sample for each choice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intrafusion.lab.experiments.experiment import Experiment, Options
from intrafusion.lab.experiments.reduction import measure_reduction, reduction_settings
from intrafusion.lab.experiments.subject import Subject, select_groups
from intrafusion.transport import MARGINALS

_SOURCE_MARGINALS = tuple(f"intrafusion:source_marginal={name}" for name in MARGINALS)
_TARGET_MARGINALS = tuple(f"intrafusion:target_marginal={name}" for name in ("importance", "softmax"))


def _settings(subject: Subject, options: Options) -> Iterator[dict[str, Any]]:
    return reduction_settings(subject, options, select_groups(subject, options.group))


MARGINALS_EXPERIMENT = Experiment(
    title="masses of the channels, over several networks",
    settings=_settings,
    measure=measure_reduction,
    defaults=Options(keep=(0.7,), method=(*_SOURCE_MARGINALS, *_TARGET_MARGINALS)),
    uses=frozenset({"keep", "criterion", "method", "group", "order"}),
    networks=5,
)
