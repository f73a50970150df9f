"""What making images from a network would take, by a timed step, and what of it fits into a few seconds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from intrafusion.network.inputs import ExampleInputs
from intrafusion.restore.synthesize import Synthesis

_FEWER = ((64, 120), (64, 60))
"""Images, and steps, that still keep more than noise does."""

_TIMED_IMAGES, _TIMED_STEPS = (2, 8, 32), 4
_LONG = 0.25  # seconds: where a step takes so long, it is not tried with more images


@dataclass(frozen=True)
class Affordable:
    """The making of images that fits into a time.

    Attributes:
        synthesis: what fits; None if nothing does.
        wanted: what would be better.
        seconds: estimated of `wanted`.
    """

    synthesis: Synthesis | None
    wanted: Synthesis
    seconds: float

    @property
    def is_whole(self) -> bool:
        return self.synthesis == self.wanted

    def explain(self) -> str:
        """What is done in place of what, and what would be better."""
        wanted = f"{self.wanted.images} in {self.wanted.steps} steps would take about {self.seconds:.0f} s here"
        if self.synthesis is None:
            return f"making images from the network is left out: {wanted}"
        return f"{self.synthesis.images} images are made in {self.synthesis.steps} steps: {wanted}"


def find_affordable(
    model: nn.Module, example_inputs: ExampleInputs, synthesis: Synthesis, seconds: float
) -> Affordable:
    """As many images in as many steps as fit, of a few sizes; the result depends on the machine, and how busy it is.

    Raises:
        ModelError: no image can be made from this network.
    """
    each = time_image(model, example_inputs, synthesis)
    estimate = lambda s: each * s.images * s.steps  # noqa: E731
    fitting = next((s for s in _list_sizes(synthesis) if estimate(s) <= seconds), None)
    return Affordable(fitting, synthesis, estimate(synthesis))


def time_image(model: nn.Module, example_inputs: ExampleInputs, synthesis: Synthesis) -> float:
    """Seconds that one step takes for one image: of the real work, on few images, and more where these take no time.

    The first step, in which libraries set themselves up, does not count, nor does what a busy machine adds to one of
    the others.

    Raises:
        ModelError: no image can be made from this network.
    """
    taken = 0.0
    for images in _TIMED_IMAGES:
        taken = _time_step(model, example_inputs, replace(synthesis, images=images, steps=_TIMED_STEPS, mirrored=False))
        if taken > _LONG:
            return taken / images
    return taken / _TIMED_IMAGES[-1]


def _time_step(model: nn.Module, example_inputs: ExampleInputs, synthesis: Synthesis) -> float:
    starts: list[float] = []

    def begin(*_: object) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        starts.append(time.perf_counter())

    synthesis(model, example_inputs, progress=begin)
    return min(after - before for before, after in itertools.pairwise(starts[1:]))


def _list_sizes(synthesis: Synthesis) -> Iterator[Synthesis]:
    yield synthesis
    for images, steps in _FEWER:
        if images <= synthesis.images and steps <= synthesis.steps:
            yield replace(synthesis, images=images, steps=steps)
