"""Table 1: compressed in steps with some training between, then fine-tuned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from intrafusion.compressed import Compressed
from intrafusion.lab.bench.records import ORIGINAL, WHOLE
from intrafusion.lab.experiments.experiment import Experiment, Options
from intrafusion.lab.experiments.reduction import measure_reduction as measure_once
from intrafusion.lab.experiments.reduction import recipe_of, reduction_settings
from intrafusion.lab.experiments.subject import Subject, select_groups
from intrafusion.train import Epoch, Training, train_

_SCHEDULE = ("steps", "step_epochs", "epochs", "lr", "halve_every", "batch")


def _settings(subject: Subject, options: Options) -> Iterator[dict[str, Any]]:
    schedule = {name: getattr(options, name) for name in _SCHEDULE}
    training = {**schedule, "training_images": len(subject.training())}
    for setting in reduction_settings(subject, options, select_groups(subject, options.group)):
        yield setting if setting["method"] == ORIGINAL else {**setting, **training}


def _measure(subject: Subject, setting: dict[str, Any]) -> dict[str, Any]:
    """Accuracy after every step and epoch: `stages` of {stage, epoch, accuracy}, the epoch counted from the start."""
    if setting["method"] == ORIGINAL:
        return measure_once(subject, setting)
    stages: list[dict[str, Any]] = [{"stage": ORIGINAL, "epoch": 0, "accuracy": subject.accuracy(subject.model)}]
    current, small = subject, None
    for step in range(1, setting["steps"] + 1):
        small = _shrink_further(subject, current, setting, step / setting["steps"])
        model = small.model
        _note(stages, subject, model, f"step {step}: reduced", 0)
        last = step == setting["steps"]
        epochs = setting["epochs"] if last else setting["step_epochs"]
        stage = "fine-tuned" if last else f"step {step}: trained"
        if epochs:
            noted = partial(_note_epoch, stages, subject, model, stage)
            how = choose_training(setting, epochs, setting["seed"] + step)
            train_(model, subject.training(), how, on_epoch=noted)
        current = replace(subject, model=model)
    assert small is not None
    reduced = next(s for s in reversed(stages) if s["stage"].endswith("reduced"))
    return {
        "accuracy": stages[-1]["accuracy"],
        "accuracy_reduced": reduced["accuracy"],
        "stages": stages,
        "params": small.after.params,
        "macs": small.after.macs,
        "params_before": subject.size.params,
        "macs_before": subject.size.macs,
        "recipe": recipe_of(subject, setting).to_yaml(),
    }


def _note(stages: list[dict[str, Any]], subject: Subject, model: nn.Module, stage: str, epochs: int) -> None:
    stages.append({"stage": stage, "epoch": stages[-1]["epoch"] + epochs, "accuracy": subject.accuracy(model)})


def _note_epoch(
    stages: list[dict[str, Any]], subject: Subject, model: nn.Module, stage: str, index: int, epoch: Epoch
) -> None:
    _note(stages, subject, model, stage, 1)


def _shrink_further(first: Subject, current: Subject, setting: dict[str, Any], part: float) -> Compressed:
    """The current network with this part of all that is to go gone, measured on the first one's sizes."""
    recipe = recipe_of(first, {**setting, "keep": 1 - (1 - setting["keep"]) * part})
    before = {g.name: g.size for g in first.graph.reducible}
    keep = recipe.keep
    assert isinstance(keep, float)
    wanted = {g.name: max(1, int(before.get(g.name, g.size) * keep + 1e-9)) / g.size for g in current.graph.reducible}
    return current.reduced(replace(recipe, keep={name: min(1.0, share) for name, share in wanted.items()}))


def choose_training(setting: dict[str, Any], epochs: int, seed: int) -> Training:
    """SGD with momentum 0.9, the rate halved in steps, without augmentation.

    Reference: Theus et al. 2024, section 5.2 (lr 0.01, halved every 30 epochs, batch 128).
    """
    return Training(
        epochs=epochs,
        batch_size=setting["batch"],
        optimizer="sgd",
        lr=setting["lr"],
        warmup=0.0,
        decay="halving",
        halve_every=setting["halve_every"],
        trainable="unfrozen",
        drop_last=False,
        shuffle="stream",
        seed=seed,
    )


FINE_TUNE = Experiment(
    title="compressed in steps, then fine-tuned",
    settings=_settings,
    measure=_measure,
    defaults=Options(keep=(0.5,), group=(WHOLE,), steps=2, step_epochs=1, epochs=5),
    uses=frozenset({"keep", "criterion", "method", "group", "order", "seeds", *_SCHEDULE}),
)
