"""What the layers are solved on: given images, images made from the network, or noise."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from intrafusion.arguments import Seed, checked
from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError, RecipeError, unknown_name
from intrafusion.graph import ChannelGraph
from intrafusion.measure.drift import output_error
from intrafusion.measure.size import size_of
from intrafusion.network.batches import ImagesLike, cast_like, channels_last, join_batches, read_batches
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.state import preserve_state
from intrafusion.observe.moments import MomentTaker, measure_moments
from intrafusion.progress import Progress
from intrafusion.reduce.problem import Moments
from intrafusion.restore.least_squares import LeastSquares
from intrafusion.restore.noise import Noise, batch_norms, image_like, standardise
from intrafusion.restore.restorer import Reduced
from intrafusion.restore.synthesize import Synthesis

LEVELS = ("noise", "synthetic", "images")
AFFORDABLE = 1e13  # multiply-accumulates that "auto" spends on making images: minutes on two cores


@checked
@dataclass(frozen=True, eq=False)
class Calibration:
    """Images, and what is to be known of the original network on them, found when it is first asked for.

    Attributes:
        level: "noise", "synthetic" or "images".
        images: all of them, as one call of the network.
        original: the original network.
        restorer: the one that goes with the level.
        seconds: what making the images took.
        why: why not a better level, where "auto" chose.
        seed: for the sampling of rows.
    """

    level: str
    images: Inputs
    original: nn.Module
    restorer: LeastSquares | Noise
    seconds: float = 0.0
    why: str | None = None
    seed: Seed = 0
    _moments: dict[ChannelGraph, Mapping[str, Moments]] = field(default_factory=dict, repr=False)

    __repr__ = show_briefly

    @cached_property
    def reference(self) -> nn.Module:
        """The original network as it is to be seen on these images.

        On noise, that is a copy whose batch norms have the statistics of the noise.
        """
        return standardise(self.original, self.images) if self._is_standardised else self.original

    @checked
    def moments_of(self, graph: ChannelGraph) -> Mapping[str, Moments]:
        """What is read of the channels of every group of the original network's graph, by group.

        Raises:
            ModelError: the network does not run on these images.
        """
        if graph not in self._moments:
            self._moments[graph] = self._measure_moments(graph)
        return self._moments[graph]

    @property
    def _is_standardised(self) -> bool:
        return self.level == "noise" and bool(batch_norms(self.original))

    def _measure_moments(self, graph: ChannelGraph) -> Mapping[str, Moments]:
        if not self._is_standardised:
            return measure_moments(self.original, graph, self.images, seed=self.seed)
        takers: list[MomentTaker] = []

        def watch(copy: nn.Module) -> MomentTaker:
            takers.append(MomentTaker(copy, graph, seed=self.seed))
            return takers[0]

        reference = standardise(self.original, self.images, watch)
        self.__dict__.setdefault("reference", reference)  # of the same forward pass: need not be made again
        return takers[0].moments()

    @cached_property
    def expected(self) -> list[Tensor]:
        """What the original network gives on these images."""
        return self.run(self.reference)

    @checked
    def run(self, model: nn.Module) -> list[Tensor]:
        with preserve_state(model):
            return cast_like(self.images, model).call(model)

    @checked
    def error(self, model: nn.Module) -> float:
        """Mean squared difference of the outputs to the original's, as a fraction of the variance of the original's."""
        return output_error(self.run(model), self.expected)

    @checked
    def restore(self, small: Reduced, original: nn.Module, graph: ChannelGraph) -> tuple[float, float]:
        """Solve the layers of a smaller network, in place; the error of its outputs before and after."""
        return self.restorer.restore(small, original, graph, self.images, self.reference, self.error)

    def __str__(self) -> str:
        count = len(self.images.tensors()[0]) if self.images.tensors() else 0
        if self.level == "noise" and not any(t.is_floating_point() for t in self.images.tensors()[:1]):
            return f"{count} sequences of random tokens"
        kind = {"noise": "noise images", "synthetic": "images made from the network", "images": "images"}[self.level]
        return f"{count} {kind}"


@checked
def calibrate(
    model: nn.Module,
    inputs: ExampleInputs,
    level: str = "auto",
    images: ImagesLike | None = None,
    *,
    synthesis: Synthesis | None = None,
    noise: Noise | None = None,
    seed: Seed = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Take or make images of a level; "auto" takes those given, else makes the best that it can afford.

    Args:
        inputs: one call of the network; the shape of an image.
        synthesis: how images are made from the network.
        noise: which noise.
    Raises:
        ModelError: level "images" without images; a network that no image can be made for.
        RecipeError: unknown level.
    """
    inputs = Inputs.of(inputs)
    if level not in ("auto", *LEVELS):
        raise RecipeError(unknown_name("restore", level, ("auto", *LEVELS)))
    asked, start, synthesis, why = level, time.perf_counter(), synthesis or Synthesis(seed=seed), None
    if level == "auto":
        level, why = _choose_level(model, inputs, images, synthesis)
    restorer: LeastSquares | Noise = LeastSquares(seed=seed)
    call = inputs
    if level == "images":
        if images is None:
            raise ModelError('restore="images": expected images=, got none; give a few hundred unlabelled ones.')
        call = join_batches(read_batches(images))
    elif level == "synthetic":
        try:
            call = _make_images(model, inputs, synthesis, progress)
        except ModelError as error:
            if asked != "auto":
                raise
            level, why = "noise", f"no images were given, and none could be made: {error}"
    if level == "noise":
        restorer = noise or Noise(seed=seed)
        call = restorer.make(inputs, model)
    return Calibration(level, call.map(channels_last), model, restorer, time.perf_counter() - start, why, seed)


def _make_images(model: nn.Module, inputs: Inputs, synthesis: Synthesis, progress: Progress | None) -> Inputs:
    like = image_like(inputs)
    made = synthesis(model, inputs, **({} if progress is None else {"progress": progress}))
    return inputs.map(lambda t: made if t is like else t)


def _choose_level(
    model: nn.Module, inputs: Inputs, images: ImagesLike | None, synthesis: Synthesis
) -> tuple[str, str | None]:
    """The best level for what there is, and why not a better one."""
    if images is not None:
        return "images", None
    if all(not t.is_floating_point() for t in inputs.tensors()):
        return "noise", "no inputs were given, so their tokens are random within the range of their embeddings"
    if not batch_norms(model):
        return "noise", "no images were given, and without batch norms images that are made keep no more than noise"
    work = synthesis.work(size_of(model, inputs).macs / max(1, len(image_like(inputs))))
    if work > AFFORDABLE:
        return "noise", f"no images were given, and making some would take {work:.0e} MACs (restore='synthetic' does)"
    return "synthetic", "no images were given"
