"""Figure 19 and Table 4: do the masses of the channels matter? Several trained networks, one sample for each choice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intrafusion.experiments.experiment import Experiment, Options
from intrafusion.experiments.reduction import measure, reductions
from intrafusion.experiments.subject import Subject, wanted_groups
from intrafusion.transport import MARGINALS

SOURCES = tuple(f"intrafusion:source_marginal={name}" for name in MARGINALS)
TARGETS = tuple(f"intrafusion:target_marginal={name}" for name in ("importance", "softmax"))


def settings(subject: Subject, options: Options) -> Iterator[dict[str, Any]]:
    return reductions(subject, options, wanted_groups(subject, options.group))


MARGINALS_EXPERIMENT = Experiment(
    title="masses of the channels, over several networks",
    settings=settings,
    measure=measure,
    defaults=Options(keep=(0.7,), method=(*SOURCES, *TARGETS)),
    uses=frozenset({"keep", "criterion", "method", "group", "order"}),
    networks=5,
)
