"""What an experiment is made on: a trained network with labelled images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.application import apply
from intrafusion.arguments import checked
from intrafusion.brief import show_briefly
from intrafusion.compressed import Compressed
from intrafusion.errors import ArgumentError, unknown_name
from intrafusion.graph import ChannelGraph, ChannelGroup
from intrafusion.importance.observation import needs_of
from intrafusion.inspection import inspect
from intrafusion.lab.bench.records import INNER, WHOLE
from intrafusion.lab.zoo import Images as LabelledImages
from intrafusion.measure.accuracy import accuracy
from intrafusion.measure.size import Size, size_of
from intrafusion.network.batches import ImagesLike
from intrafusion.network.inputs import Inputs
from intrafusion.network.tensors import named_tensors
from intrafusion.planning import decide
from intrafusion.recipe import Recipe
from intrafusion.restore import Calibration
from intrafusion.restore.steps import calibrate_for, run_restorers

_CALIBRATION = 256  # training images that criteria and restorers may look at


@checked
@dataclass(frozen=True, eq=False)
class Subject:
    """A trained network and the images that it is measured on.

    Attributes:
        name: in records and reports.
        inputs: of one forward call.
        test: to measure accuracy on.
        train: to fine-tune on; its first `_CALIBRATION` are for criteria and restorers that look at images.
    """

    name: str
    model: nn.Module
    inputs: Inputs
    test: LabelledImages
    train: LabelledImages | None = None

    __repr__ = show_briefly

    @cached_property
    def graph(self) -> ChannelGraph:
        return inspect(self.model, self.inputs)

    @cached_property
    def size(self) -> Size:
        return size_of(self.model, self.inputs)

    @cached_property
    def setting(self) -> dict[str, Any]:
        """What tells it from other subjects in a setting."""
        return {"network": self.name, "weights": fingerprint(self.model), "images": len(self.test)}

    def accuracy(self, model: nn.Module) -> float:
        """On the test images, in [0, 1]; networks of this architecture with the same weights are run once."""
        weights = fingerprint(model)
        if weights not in self.accuracies:
            self.accuracies[weights] = accuracy(model, self.test.images, self.test.labels)
        return self.accuracies[weights]

    @cached_property
    def accuracies(self) -> dict[str, float]:
        return {}

    def groups(self) -> list[ChannelGroup]:
        """Groups that can be reduced, from the output backwards; one of each family of twins."""
        found = {g.family: g for g in reversed(self.graph.reducible) if g.is_channel}
        return sorted(found.values(), key=lambda g: (g.depth is None, g.depth))

    def scope(self, group: str) -> dict[str, Any]:
        """Options of a recipe that reduce this group only, or those of a scope.

        Raises:
            ArgumentError: neither a group of this network nor a scope.
        """
        if group == WHOLE:
            return {}
        if group == INNER:  # those that no shortcut adds to: one layer produces them
            return {"include": [g.producers[0] for g in self.graph.reducible if len(g.producers) == 1]}
        known = {g.name: g for g in self.groups()}
        if group not in known:
            raise ArgumentError(f"{self.name}: {unknown_name('group', group, [WHOLE, INNER, *known])}")
        twins = [g for g in self.graph.reducible if g.is_channel and g.family == known[group].family]
        return {"include": list(dict.fromkeys(g.producers[0] for g in twins))}

    def reduced(self, recipe: Recipe) -> Compressed:
        """The smaller network, as `compress` makes it; images are shown only to what cannot do without.

        Raises:
            ArgumentError: images are needed and there are no training images.
        """
        images = self.labelled() if _needs_images(recipe) else None
        calibration = self.calibration(recipe, images)
        plan = decide(self.model, self.graph, recipe, self.inputs, calibration=calibration, images=images)
        small = apply(self.model, plan, self.inputs, graph=self.graph)
        return run_restorers(small, self.model, self.graph, calibration, images)

    def calibration(self, recipe: Recipe, images: ImagesLike | None) -> Calibration | None:
        """Made once for all recipes that ask for the same."""
        key = repr((recipe.restore, recipe.seed, recipe.needs_moments, images is None))
        if key not in self.calibrations:
            self.calibrations[key] = calibrate_for(self.model, self.graph, self.inputs, recipe, images)
        return self.calibrations[key]

    @cached_property
    def calibrations(self) -> dict[str, Calibration | None]:
        return {}

    def labelled(self) -> list[tuple[Tensor, Tensor]]:
        """The first training images and their labels, in batches."""
        first = LabelledImages(self.training().images[:_CALIBRATION], self.training().labels[:_CALIBRATION])
        return [(batch.images, batch.labels) for batch in first.batches(128)]

    def training(self) -> LabelledImages:
        if self.train is None:
            raise ArgumentError(f"{self.name}: training images are wanted, and there are none; name some with --data.")
        return self.train


def _needs_images(recipe: Recipe) -> bool:
    """Whether the criterion or a step against the loss cannot do without images."""
    if needs_of(recipe.importance) - {"tensors"} or "images" in recipe.levels:
        return True
    return any(step.needs_data for step in recipe.restore if not isinstance(step, str))


def fingerprint(model: nn.Module) -> str:
    """Eight hexadecimal digits of the SHA-256 of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors(model).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]


def index_by_name(subjects: Iterable[Subject]) -> dict[str, Subject]:
    """Raises ArgumentError if two have the same name."""
    found: dict[str, Subject] = {}
    for subject in subjects:
        if subject.name in found:
            raise ArgumentError(f"two networks are called {subject.name!r}; name each once.")
        found[subject.name] = subject
    return found


Measure = Callable[[Subject, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Measurement:
    """setting -> result for any of several subjects; pickles, so it can travel to workers."""

    subjects: dict[str, Subject]
    measure: Measure

    __repr__ = show_briefly

    def __call__(self, setting: Any) -> dict[str, Any]:
        return self.measure(self.subjects[setting["network"]], setting)


def select_groups(subject: Subject, names: Sequence[str] | None) -> list[str]:
    """The groups named, checked, or all of them."""
    if names is None:
        return [g.name for g in subject.groups()]
    for name in names:
        subject.scope(name)
    return list(names)
