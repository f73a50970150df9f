"""What the layers are solved on: given images, images made from the network, or noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import nn

from intrafusion.arguments import Positive, Seed, checked
from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError, RecipeError, unknown_name
from intrafusion.graph import ChannelGraph
from intrafusion.measure.closeness import Yardstick
from intrafusion.network.apart import borrow
from intrafusion.network.batches import (
    ImagesLike,
    channels_last,
    count_images,
    name_inputs,
    take_images,
)
from intrafusion.network.calibration_images import as_calls, warn_caller
from intrafusion.network.free_memory import MemoryLike, read_memory
from intrafusion.network.held_out import held_out_places
from intrafusion.network.images_first import put_images_first
from intrafusion.network.input_batches import Batches, read_input_batches
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.pass_memory import take_fitting
from intrafusion.network.texts import Tokenizer, make_sentences
from intrafusion.network.wrappers import outside_inference
from intrafusion.observe.moments import MomentTaker, measure_moments
from intrafusion.progress import ShowProgress, shows_progress
from intrafusion.reduce.problem import Moments
from intrafusion.restore.affordable import find_affordable
from intrafusion.restore.least_squares import LeastSquares
from intrafusion.restore.mirrored import check_mirrors
from intrafusion.restore.noise import Noise, batch_norms, image_like, standardise
from intrafusion.restore.restorer import Reduced
from intrafusion.restore.synthesize import Synthesis, find_mismatch
from intrafusion.restore.texts import SAMPLED, find_sampler, sample_texts

LEVELS = ("noise", "synthetic", "images", "mirrored")
AFFORDABLE = 20.0  # seconds that "auto" spends on making images

_HELD_OUT = 64  # images of noise
_NEARER = 0.3
"""Of how far noise is from what batch norms remember, images made from the network are at most this part.

0.6 to 0.8 on digits of 8 pixels, which keep more on noise; 0.1 to 0.2 on `cifar10_resnet20` in 60 steps, which keeps
more on images that are made; 0.75 there in 15 steps, which are too few.
"""
_KINDS = {"noise": "noise images", "synthetic": "images made from the network"}
_TOKEN_KINDS = {"noise": "sequences of random tokens", "synthetic": SAMPLED}
_SENTENCES, _WORDS = 256, "sentences of dictionary words"

T = TypeVar("T")


@checked
@dataclass(frozen=True, eq=False)
class Calibration:
    """Images, and what is to be known of the original network on them, found when it is first asked for.

    Attributes:
        level: "noise", "synthetic", "images" or "mirrored", which are the same here.
        images: all of them, in batches.
        original: the original network.
        restorer: the one that goes with the level.
        seconds: what making the images took.
        why: why not a better level, where "auto" chose.
        seed: for the sampling of rows.
        held_out: images of the same kind that nothing is solved on; None where there are too few.
        made: how many were made from the network, before they were parted and mirrored.
        what: what they are, in the plural, where the level does not say it.
    """

    level: str
    images: Batches
    original: nn.Module
    restorer: LeastSquares | Noise
    seconds: float = 0.0
    why: str | None = None
    seed: Seed = 0
    held_out: Batches | None = None
    made: int | None = None
    what: str | None = None
    _moments: dict[ChannelGraph, Mapping[str, Moments]] = field(default_factory=dict, repr=False)

    __repr__ = show_briefly

    @cached_property
    def reference(self) -> nn.Module:
        """The original network as it is to be seen on these images.

        On noise, that is a copy whose batch norms have the statistics of the noise.
        """
        return standardise(self.original, self.images) if self.is_standardised else self.original

    @checked
    def moments_of(self, graph: ChannelGraph) -> Mapping[str, Moments]:
        """What is read of the channels of every group of the original network's graph, by group.

        Raises:
            ModelError: the network does not run on these images.
        """
        if graph not in self._moments:
            self._moments[graph] = self._measure_moments(graph)
        return self._moments[graph]

    def seen_by(self, model: nn.Module) -> Calibration:
        """The same images for a network that took the original's place; nothing is known of it on them yet."""
        return replace(self, original=model, seconds=0.0, _moments={})

    @property
    def is_standardised(self) -> bool:
        """Whether the batch norms have the statistics of the noise while layers are solved."""
        return self.level == "noise" and bool(batch_norms(self.original))

    def _measure_moments(self, graph: ChannelGraph) -> Mapping[str, Moments]:
        if not self.is_standardised:
            return measure_moments(self.original, graph, self.images, seed=self.seed)
        takers: list[MomentTaker] = []

        def watch(copy: nn.Module) -> MomentTaker:
            takers.append(MomentTaker(copy, graph, seed=self.seed).look_at(self.images))
            return takers[0]

        reference = standardise(self.original, self.images, watch)
        self.__dict__.setdefault("reference", reference)  # of the same forward pass: need not be made again
        return takers[0].moments()

    @cached_property
    def yardstick(self) -> Yardstick:
        """What smaller networks are measured by: the images held out, or all where none are."""
        measured = self.images if self.held_out is None else self.held_out
        return Yardstick(self.reference, measured, self.kind, unseen=self.held_out is not None)

    @property
    def plain_yardstick(self) -> Yardstick | None:
        """The same for a network as it is; None on noise, which is no measure of one with statistics of its own."""
        return None if self.is_standardised else self.yardstick

    @property
    def kind(self) -> str:
        """What the images are, in the plural."""
        named = self.images.kind
        return self.what or (_KINDS if named == "images" else _TOKEN_KINDS).get(self.level, named)

    def explain_counts(self) -> str | None:
        """Where the images went that were made from the network; None where none were."""
        if self.made is None:
            return None
        apart = 0 if self.held_out is None else self.held_out.count
        mirrored = " and their mirror images" if self.images.count > self.made - apart else ""
        measured = f", {apart} to measure on" if apart else ""
        return f"{self.made} were made: {self.made - apart}{mirrored} to solve on{measured}"

    @checked
    def restore(
        self, small: Reduced, original: nn.Module, graph: ChannelGraph, measure: Callable[[nn.Module], T]
    ) -> tuple[T, T]:
        """Solve the layers of a smaller network, in place; what `measure` gives of it before and after.

        On noise, it is given the network with the statistics of the noise in its batch norms.
        """
        return self.restorer.restore(small, original, graph, self.images, self.reference, measure)

    def solve(
        self, small: Reduced, graph: ChannelGraph, images: Batches, measure: Callable[[nn.Module], T]
    ) -> tuple[T, T]:
        """The same on other images than its own, or some of them."""
        return self.restorer.restore(small, self.original, graph, images, self.reference, measure)

    def __str__(self) -> str:
        return f"{self.images.count} {self.kind}"


@checked
@outside_inference
@shows_progress("calibrate")
def calibrate(
    model: nn.Module,
    inputs: ExampleInputs,
    level: str = "auto",
    images: ImagesLike | None = None,
    *,
    synthesis: Synthesis | None = None,
    noise: Noise | None = None,
    seed: Seed = 0,
    tokenizer: Tokenizer | None = None,
    memory: MemoryLike = None,
    affordable: Positive | None = None,
    progress: ShowProgress = None,
) -> Calibration:
    """Take or make images of a level; "auto" takes those given, else makes the best that it can afford.

    Of images that are made, some are held out.

    Args:
        inputs: one call of the network; the shape of an image.
        synthesis: how images are made from the network.
        noise: which noise.
        tokenizer: of a network of tokens, for sentences of dictionary words in place of random tokens.
        memory: bytes, or text such as "2GB", that what is held of the inputs and of what is computed of them may take;
            None: half of what is free.
        affordable: seconds that "auto" spends on making images; None: 20.
    Raises:
        ModelError: level "images" or "mirrored" without images, or what has no mirror image; a network that no image
            can be made for, or that is no causal language model where it reads tokens.
        RecipeError: unknown level, or less memory than one image takes.
    Warns:
        IntrafusionWarning: "auto" cannot afford the images that it would make.
    """
    model, inputs = borrow(model), Inputs.of(inputs)
    inputs = put_images_first(inputs, model) if images is None else inputs
    if level not in ("auto", *LEVELS):
        raise RecipeError(unknown_name("restore", level, ("auto", *LEVELS)))
    start, synthesis, noise = time.perf_counter(), synthesis or Synthesis(seed=seed), noise or Noise(seed=seed)
    made, why, what, most = None, None, None, read_memory(memory)
    if level == "auto":
        level, made, why = _choose_level(model, inputs, images, synthesis, affordable or AFFORDABLE, most, noise)
    if level in ("images", "mirrored"):
        if images is None:
            raise ModelError(f'restore="{level}": expected images=, got none; give a few hundred unlabelled ones.')
        made = images if isinstance(images, Batches) else as_calls(images, model, inputs, tokenizer), None
    elif level == "noise":
        made, what = _make_noise(model, inputs, noise, tokenizer)
    elif made is None:
        made = _make_inputs(model, inputs, synthesis, most)
    whole = level == "noise" and bool(batch_norms(model))  # each norm has to see all of it, and it is little
    if whole and most is not None:
        made = tuple(take_fitting(model, call, most) if isinstance(call, Inputs) else call for call in made)
    complete = partial(_complete, outputs=inputs.outputs)
    seen, apart = (
        None if given is None else read_input_batches(given, None if whole else model, most).then(complete)
        for given in made
    )
    assert seen is not None
    if level == "mirrored":
        check_mirrors(seen.first)
    restorer = noise if level == "noise" else LeastSquares(seed=seed)
    count = _count_made(synthesis, seen, apart) if level == "synthetic" else None
    return Calibration(level, seen, model, restorer, time.perf_counter() - start, why, seed, apart, count, what)


def _complete(call: Inputs, outputs: tuple[str | int, ...] | None) -> Inputs:
    """As convolutions read it fastest, with the outputs that matter."""
    return replace(call.map(channels_last), outputs=outputs)


_Parts = tuple[Inputs, Inputs | None]
"""Images to solve layers on, and those that are held out."""


def _make_noise(
    model: nn.Module, inputs: Inputs, noise: Noise, tokenizer: Tokenizer | None
) -> tuple[_Parts, str | None]:
    """And what it is, where that is not just noise."""
    if tokenizer is not None and name_inputs(inputs) == "sequences":
        sentences = make_sentences(tokenizer, _SENTENCES + _HELD_OUT, noise.seed)
        if sentences is not None:
            call = read_input_batches(as_calls(sentences, model, inputs, tokenizer) or ()).join()
            return (take_images(call, 0, _SENTENCES), take_images(call, _SENTENCES, len(sentences))), _WORDS
    few = replace(noise, images=min(noise.images, _HELD_OUT), seed=noise.seed + 1)
    return (noise.make(inputs, model), few.make(inputs, model)), None


def _make_inputs(model: nn.Module, inputs: Inputs, synthesis: Synthesis, memory: int | None) -> _Parts:
    """Texts sampled from a language model, images made from another network."""
    if name_inputs(inputs) == "sequences":
        return sample_texts(find_sampler(model, inputs), synthesis.seed, synthesis.seconds)[:2]
    return _make_images(model, inputs, synthesis, memory)


def _make_images(model: nn.Module, inputs: Inputs, synthesis: Synthesis, memory: int | None) -> _Parts:
    """Mirror images are made of those that the layers are solved on only."""
    like = image_like(inputs)
    made = replace(synthesis, mirrored=False)(model, inputs, memory=memory)
    apart = torch.zeros(len(made), dtype=torch.bool, device=made.device)
    apart[held_out_places(len(made)).to(made.device)] = True
    seen, held = synthesis.mirror(made[~apart]), made[apart]
    as_call = lambda images: inputs.map(lambda t: images if t is like else t)  # noqa: E731
    return as_call(seen), as_call(held) if len(held) else None


def _count_made(synthesis: Synthesis, seen: Batches, apart: Batches | None) -> int:
    mirrored = synthesis.mirrored and seen.kind == "images" and image_like(seen.first).dim() > 3
    copies = 2 if mirrored else 1  # as `Synthesis.mirror`
    return seen.count // copies + (0 if apart is None else apart.count)


def _choose_level(
    model: nn.Module,
    inputs: Inputs,
    images: ImagesLike | None,
    synthesis: Synthesis,
    seconds: float,
    memory: int | None,
    noise: Noise,
) -> tuple[str, _Parts | None, str | None]:
    """The best level for what there is, the images where some were made, and why not a better one."""
    if images is not None:
        return "images", None, None
    if all(not t.is_floating_point() for t in inputs.tensors()):
        return _choose_for_tokens(model, inputs, synthesis.seed, seconds)
    if not batch_norms(model):
        why = "no images were given, and without batch norms images that are made keep no more than noise"
        return "noise", None, why
    try:
        found = find_affordable(model, inputs, synthesis, seconds)
        if not found.is_whole:
            warn_caller(f"no images were given, and {found.explain()}. {_BETTER}")
        if found.synthesis is not None:
            made = _make_images(model, inputs, found.synthesis, memory)
            unlike = _explain_unlike(model, inputs, made[0], noise)
            why = "; ".join(filter(None, ("no images were given", None if found.is_whole else found.explain(), unlike)))
            return ("synthetic", made, why) if unlike is None else ("noise", None, why)
    except (ModelError, RecipeError) as error:  # the network does not run on them, or memory is too little for one
        return "noise", None, f"no images were given, and none could be made: {error}"
    return "noise", None, f"no images were given; {found.explain()}"


def _explain_unlike(model: nn.Module, inputs: Inputs, made: Inputs, noise: Noise) -> str | None:
    """Why noise is better than images that were made; None where these are.

    Both are to stand for data of which the batch norms remember mean and deviation of every channel. Where as many
    images of noise are about as near to that, and nobody bent them to be, what else images that were bent have in
    common is chance.
    """
    as_many = replace(noise, images=count_images(made)).make(inputs, model)
    off, noisy = (find_mismatch(model, images) for images in (made, as_many))
    if not off > _NEARER * noisy:
        return None
    return f"images made from the network are {off:.2g} off what its batch norms remember, noise is {noisy:.2g}"


def _choose_for_tokens(
    model: nn.Module, inputs: Inputs, seed: int, seconds: float
) -> tuple[str, _Parts | None, str | None]:
    """Texts that a language model samples itself, else noise."""
    try:
        seen, apart, fewer = sample_texts(find_sampler(model, inputs), seed, seconds)
    except ModelError as error:
        return "noise", None, f"no inputs were given; {str(error).rstrip('.')}"
    return "synthetic", (seen, apart), "; ".join(filter(None, ("no inputs were given", fewer)))


_BETTER = (
    "Better: images=, a few hundred unlabelled ones; or restore='synthetic', which takes that time; "
    "restore='noise' if this is what is meant."
)
