"""Table 1: compressed in steps with some training between, then fine-tuned."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from intrafusion.compressed import Compressed
from intrafusion.lab.experiments.experiment import Experiment, Options
from intrafusion.lab.experiments.method import ORIGINAL
from intrafusion.lab.experiments.reduction import measure_reduction as measure_once
from intrafusion.lab.experiments.reduction import recipe_of, reduction_settings
from intrafusion.lab.experiments.subject import WHOLE, Subject, select_groups
from intrafusion.lab.zoo import Images

SCHEDULE = ("steps", "step_epochs", "epochs", "lr", "halve_every", "batch")


def settings(subject: Subject, options: Options) -> Iterator[dict[str, Any]]:
    schedule = {name: getattr(options, name) for name in SCHEDULE}
    training = {**schedule, "training_images": len(subject.training())}
    for setting in reduction_settings(subject, options, select_groups(subject, options.group)):
        yield setting if setting["method"] == ORIGINAL else {**setting, **training}


def measure(subject: Subject, setting: dict[str, Any]) -> dict[str, Any]:
    """Accuracy after every step and epoch: `stages` of {stage, epoch, accuracy}, the epoch counted from the start."""
    if setting["method"] == ORIGINAL:
        return measure_once(subject, setting)
    stages: list[dict[str, Any]] = [{"stage": ORIGINAL, "epoch": 0, "accuracy": subject.accuracy(subject.model)}]
    current, small = subject, None
    for step in range(1, setting["steps"] + 1):
        small = shrunk(subject, current, setting, step / setting["steps"])
        model = small.model
        note(stages, subject, model, f"step {step}: reduced", 0)
        last = step == setting["steps"]
        epochs = setting["epochs"] if last else setting["step_epochs"]
        for _ in train_(model, subject.training(), epochs, setting, setting["seed"] + step):
            note(stages, subject, model, "fine-tuned" if last else f"step {step}: trained", 1)
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


def note(stages: list[dict[str, Any]], subject: Subject, model: nn.Module, stage: str, epochs: int) -> None:
    stages.append({"stage": stage, "epoch": stages[-1]["epoch"] + epochs, "accuracy": subject.accuracy(model)})


def shrunk(first: Subject, current: Subject, setting: dict[str, Any], part: float) -> Compressed:
    """The current network with this part of all that is to go gone, measured on the first one's sizes."""
    recipe = recipe_of(first, {**setting, "keep": 1 - (1 - setting["keep"]) * part})
    before = {g.name: g.size for g in first.graph.reducible}
    keep = recipe.keep
    assert isinstance(keep, float)
    wanted = {g.name: max(1, int(before.get(g.name, g.size) * keep + 1e-9)) / g.size for g in current.graph.reducible}
    return current.reduced(replace(recipe, keep={name: min(1.0, share) for name, share in wanted.items()}))


def train_(model: nn.Module, data: Images, epochs: int, schedule: dict[str, Any], seed: int) -> Iterator[float]:
    """Train in place, giving back the mean loss after each epoch: SGD with momentum 0.9, the rate halved in steps.

    Each epoch takes the images in a new random order, without augmentation.

    Reference: Theus et al. 2024, section 5.2 (lr 0.01, halved every 30 epochs, batch 128).
    """
    stepper = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=schedule["lr"], momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for group in stepper.param_groups:
            group["lr"] = schedule["lr"] * 0.5 ** (epoch // schedule["halve_every"])
        yield epoch_(model, data, schedule["batch"], stepper, generator)


def epoch_(
    model: nn.Module, data: Images, size: int, stepper: torch.optim.Optimizer, generator: torch.Generator
) -> float:
    reference, total = next(model.parameters()), 0.0
    modes = copy.copy({module: module.training for module in model.modules()})
    model.train()
    chosen = torch.randperm(len(data), generator=generator).split(size)
    chosen = [part for part in chosen if len(part) > 1] or list(chosen)  # a batch norm cannot train on a single image
    for part in chosen:
        loss = F.cross_entropy(model(data.images[part].to(reference)), data.labels[part].to(reference.device))
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        total += loss.item()
    for module, training in modes.items():
        module.training = training
    return total / len(chosen)


FINE_TUNE = Experiment(
    title="compressed in steps, then fine-tuned",
    settings=settings,
    measure=measure,
    defaults=Options(keep=(0.5,), group=(WHOLE,), steps=2, step_epochs=1, epochs=5),
    uses=frozenset({"keep", "criterion", "method", "group", "order", "seeds", *SCHEDULE}),
)
