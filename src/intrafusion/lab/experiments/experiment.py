"""What an experiment is: settings to measure on each subject, and how one of them is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intrafusion.arguments import checked
from intrafusion.brief import show_briefly
from intrafusion.errors import ArgumentError, unknown_name
from intrafusion.importance import get_importance
from intrafusion.lab.bench.cluster import Cluster
from intrafusion.lab.bench.records import Record
from intrafusion.lab.bench.sweeping import Setting, sweep
from intrafusion.lab.experiments.method import OURS, parse_method, spell_ours
from intrafusion.lab.experiments.subject import Measure, Measurement, Subject, index_by_name
from intrafusion.progress import ShowProgress, shows_progress
from intrafusion.recipe import ORDERS


@checked
@dataclass(frozen=True)
class Options:
    """What is varied in an experiment. Each experiment uses some of these, and has defaults of its own.

    Attributes:
        keep: fractions of channels to keep.
        criterion: names of importance criteria.
        method: see `method.parse_method`, or `OURS` for the default of `compress`.
        group: names of groups or scopes; None for all groups.
        order: of the groups, see `Recipe`.
        seeds: how many random draws.
        points: of each axis of a landscape.
        steps: of iterative compression.
        step_epochs: of training after each step but the last.
        epochs: of training at the end.
        lr: learning rate.
        halve_every: epochs after which the learning rate is halved.
        batch: images of one training step.
    """

    keep: tuple[float, ...] = (0.9, 0.7, 0.5, 0.3)
    criterion: tuple[str, ...] = ("l1",)
    method: tuple[str, ...] = ("select", "intrafusion", OURS)
    group: tuple[str, ...] | None = None
    order: str = "joint"
    seeds: int = 1
    points: int = 15
    steps: int = 2
    step_epochs: int = 1
    epochs: int = 5
    lr: float = 0.01
    halve_every: int = 30
    batch: int = 128

    __repr__ = show_briefly

    def __post_init__(self) -> None:
        for keep in self.keep:
            if not 0 < keep <= 1:
                raise ArgumentError(f"keep: expected fractions in (0, 1], got {keep}; 0.7 keeps 70 % of the channels.")
        for criterion in self.criterion:
            get_importance(criterion)
        if self.order not in ORDERS:
            raise ArgumentError(unknown_name("order", self.order, ORDERS))


@checked
@dataclass(frozen=True)
class Experiment:
    """An experiment of the paper.

    Attributes:
        title: one line.
        settings: what to measure on one subject; each setting holds the subject's own.
        measure: one of them.
        defaults: of the options.
        uses: names of the options that it heeds.
        networks: how many networks it usually compares; where that is more than one, it wants two at least.
    """

    title: str
    settings: Callable[[Subject, Options], Iterator[dict[str, Any]]]
    measure: Measure
    defaults: Options
    uses: frozenset[str]
    networks: int = 1

    __repr__ = show_briefly


@checked
@shows_progress("experiment")
def run_experiment(
    name: str,
    experiment: Experiment,
    subjects: Sequence[Subject],
    options: Options,
    path: Path,
    *,
    cluster: Cluster | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: ShowProgress = None,
) -> list[Record]:
    """Measure what the file has no record of yet; see `bench.sweep`.

    Raises:
        ArgumentError: unknown names, or fewer networks than the experiment wants.
    """
    if len(subjects) < min(2, experiment.networks):
        raise ArgumentError(f"{name}: expected two or more networks to compare, got {len(subjects)}.")
    known = index_by_name(subjects)
    for text in options.method:
        parse_method(spell_ours(text, images=True))  # before the work
    settings: list[Setting] = [s for subject in subjects for s in experiment.settings(subject, options)]
    measurement = Measurement(known, experiment.measure)
    return sweep(name, settings, measurement, path, cluster=cluster, provenance=provenance)
