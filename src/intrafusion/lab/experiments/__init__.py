"""The experiments of Theus et al. 2024 on any network: one file each, all on the sweep of `bench`."""

from __future__ import annotations

from intrafusion.arguments import checked
from intrafusion.errors import ArgumentError, unknown_name
from intrafusion.lab.experiments.data_free import DATA_FREE
from intrafusion.lab.experiments.experiment import Experiment, Options, run_experiment
from intrafusion.lab.experiments.fine_tune import FINE_TUNE
from intrafusion.lab.experiments.landscape import LANDSCAPE
from intrafusion.lab.experiments.marginals import MARGINALS_EXPERIMENT
from intrafusion.lab.experiments.method import OURS
from intrafusion.lab.experiments.output_drift import OUTPUT_DRIFT
from intrafusion.lab.experiments.random_importance import RANDOM_IMPORTANCE
from intrafusion.lab.experiments.subject import Subject
from intrafusion.lab.experiments.whole_model import WHOLE_MODEL

EXPERIMENTS: dict[str, Experiment] = {
    "data-free": DATA_FREE,
    "whole-model": WHOLE_MODEL,
    "fine-tune": FINE_TUNE,
    "marginals": MARGINALS_EXPERIMENT,
    "random-importance": RANDOM_IMPORTANCE,
    "output-drift": OUTPUT_DRIFT,
    "landscape": LANDSCAPE,
}


@checked
def get_experiment(name: str) -> Experiment:
    """Raises ArgumentError for an unknown name."""
    if name not in EXPERIMENTS:
        raise ArgumentError(unknown_name("experiment", name, EXPERIMENTS))
    return EXPERIMENTS[name]


__all__ = ["EXPERIMENTS", "OURS", "Experiment", "Options", "Subject", "get_experiment", "run_experiment"]
