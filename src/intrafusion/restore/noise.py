"""Restoration without data: least squares on smooth noise, with every batch norm made to see what it expects."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from intrafusion.arguments import Seed, checked
from intrafusion.errors import NoInputsError, RecipeError
from intrafusion.graph import ChannelGraph
from intrafusion.network.apart import borrow
from intrafusion.network.batches import ImagesLike, cast_like
from intrafusion.network.input_batches import Batches, read_input_batches
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.layers import Layer, find_layers, is_solvable
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import check_graph, copy_model, named_tensors
from intrafusion.reduce.problem import ReductionMap
from intrafusion.restore.restorer import Reduced
from intrafusion.restore.solver import LayerSolver
from intrafusion.restore.statistics import find_output_merge
from intrafusion.restore.tokens import draw_tokens, find_token_ranges
from intrafusion.surgery.maps import mean_weights, reduce_weights
from intrafusion.surgery.write import write_weights_

_PIXELS = 2**19  # of all noise images together, unless that would leave fewer than _FEWEST
_FEWEST = 32

T = TypeVar("T")
Watch = Callable[[nn.Module], contextlib.AbstractContextManager[object]]


@checked
@dataclass(frozen=True)
class Noise:
    r"""Least squares without data, in seconds: the images are noise, and every batch norm standardises its input.

    Neighbouring pixels of natural images are alike: the noise is Gaussian with amplitude 1 / f^slope at the spatial
    frequency f, mean 0 and deviation 1. On it, both networks run with the statistics of the noise in their batch norms,
    so that behind every norm each channel has the mean beta and the deviation |gamma| that it has on the data, and
    only the correlations of channels come from noise. The layers are solved there (see `LeastSquares`); what was added
    to a layer is then added to the network with its own statistics, in units of the norm behind the layer. Without
    batch norms the noise stands for images that were scaled to mean 0 and deviation 1.

    What earlier restorers wrote is replaced. OURS.

    Attributes:
        strength, steps, rows, drift, seed: as in `LeastSquares`; the seed is also that of the noise.
        scarcity: likewise; ten times as much, for where rows are few they are not even of the data.
        images: how many, fewer where they are large (all pixels together 2^19, at least 32 images).
        slope: of the amplitude over the spatial frequency; 0 is white noise.
    """

    strength: float = 1e-3
    scarcity: float = 2.0
    steps: int = 3
    rows: int = 20_000
    drift: bool = True
    seed: Seed = 0
    images: int = 512
    slope: float = 1.5

    needs_data = False  # of the class, not a hyper-parameter

    def __post_init__(self) -> None:
        self.solver  # noqa: B018  # refuses hyper-parameters that mean nothing
        if self.images < 2:
            raise RecipeError(f"images: expected at least 2, got {self.images!r}.")

    @property
    def solver(self) -> LayerSolver:
        return LayerSolver(self.strength, self.scarcity, self.steps, self.rows, self.drift, self.seed)

    @checked
    def __call__(
        self, compressed: Reduced, reference: nn.Module, graph: ChannelGraph, images: ImagesLike | None = None
    ) -> None:
        """Write the solved weights into `compressed.model`, or on any error none of them.

        Args:
            images: what to use instead of noise; batch norms are standardised on it all the same.
        Raises:
            ModelError: the network does not take a single image tensor, or gives NaN on noise.
        """
        check_graph(graph, reference)
        reference = borrow(reference)
        noise = self.make(compressed.inputs, reference) if images is None else images
        batches = read_input_batches(noise)
        self.restore(compressed, reference, graph, batches, standardise(reference, batches), lambda _: None)

    def restore(
        self,
        compressed: Reduced,
        original: nn.Module,
        graph: ChannelGraph,
        images: Batches,
        reference: nn.Module,
        measure: Callable[[nn.Module], T],
    ) -> tuple[T, T]:
        """The same, measured.

        Args:
            reference: what `standardise(original, images)` gave.
            measure: of a network, such as its error.
        Returns:
            what that is of the smaller network with the statistics of the noise in its batch norms, before and after.
        """
        maps = compressed.plan.maps
        small, result = copy_model(compressed.model).eval(), copy_model(compressed.model)
        write_weights_(small, _reduce_tensors(reference, graph, maps))
        write_weights_(result, _reduce_tensors(original, graph, maps))
        before = measure(small)
        solved = self.solver.solve_(small, maps, reference, graph, images, bare=False, memory=images.memory)
        small_seen, small_own, seen, own = (
            find_layers(m, graph, is_solvable) for m in (small, result, reference, original)
        )
        for name, (change, shift) in solved.changes.items():
            merge = find_output_merge(own[name], graph, maps)
            rows = _find_gains(small_seen[name], small_own[name], seen[name], own[name], merge)
            small_own[name].add_(rows[:, None] * change, rows * shift)
        write_weights_(result, solved.norms)  # of which the statistics are no part
        write_weights_(compressed.model, {name: t.detach() for name, t in named_tensors(result).items()})
        return before, measure(small)

    @checked
    def make(self, example_inputs: ExampleInputs, model: nn.Module | None = None) -> Inputs:
        """Noise in the shape, on the device and in the precision of the one image tensor of a call.

        Args:
            model: for calls that hold token numbers, of which it tells the range; see `draw_tokens`.
        """
        ranges = {} if model is None else find_token_ranges(model, Inputs.of(example_inputs))
        if ranges:
            return draw_tokens(Inputs.of(example_inputs), ranges, self.images, self.seed)
        like = image_like(example_inputs)
        pixels = math.prod(like.shape[2:])
        count = min(self.images, max(_FEWEST, _PIXELS // max(1, pixels)))
        generator = torch.Generator().manual_seed(self.seed)
        white = torch.randn(count, *like.shape[1:], generator=generator)
        noise = smooth(white, self.slope).to(like)
        return Inputs.of(example_inputs).map(lambda t: noise if t is like else t)


def image_like(example_inputs: ExampleInputs) -> Tensor:
    """The one floating-point tensor of a call.

    Raises:
        NoInputsError: there is none, or more than one.
    """
    inputs = Inputs.of(example_inputs)
    tensors = inputs.tensors()
    if len(tensors) != 1 or not tensors[0].is_floating_point() or tensors[0].dim() < 2:
        raise NoInputsError(f"images: expected a network of one floating-point input (n, ...), got {inputs}.")
    return tensors[0]


def smooth(white: Tensor, slope: float) -> Tensor:
    """White noise (n, c, *spatial) with amplitude 1 / f^slope, deviation 1; rows without spatial dimensions as is."""
    dims = tuple(range(2, white.dim()))
    if not dims:
        return white
    axes = [torch.fft.fftfreq(white.shape[d]) * white.shape[d] for d in dims[:-1]]
    axes.append(torch.fft.rfftfreq(white.shape[-1]) * white.shape[-1])
    frequency = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt()
    spectrum = torch.fft.rfftn(white, dim=dims) * frequency.clamp(min=1).pow(-slope)
    field = torch.fft.irfftn(spectrum, s=white.shape[2:], dim=dims)
    return field / field.std()


def standardise(model: nn.Module, inputs: Inputs | Batches, watch: Watch = contextlib.nullcontext) -> nn.Module:
    """A copy, in evaluation mode, whose batch norms remember the statistics of these images instead of their own.

    Args:
        inputs: each norm has to see all of them before what it gives is read: they go through together.
        watch: makes a context of the copy, for the one forward pass that it takes, if there are batch norms.
    """
    copy = copy_model(model).eval()
    norms = batch_norms(copy)
    if not norms:
        return copy
    with preserve_state(copy), watch(copy):
        for norm in norms:
            norm.training, norm.momentum = True, 1.0
        cast_like(inputs.join() if isinstance(inputs, Batches) else inputs, copy).call(copy)
        statistics = [(n.running_mean.clone(), n.running_var.clone()) for n in norms]  # type: ignore[union-attr]
    for norm, own, (mean, variance) in zip(norms, batch_norms(model), statistics, strict=True):
        norm.momentum = own.momentum
        norm.running_mean.copy_(mean)  # type: ignore[union-attr]
        norm.running_var.copy_(variance)  # type: ignore[union-attr]
    return copy


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def _reduce_tensors(model: nn.Module, graph: ChannelGraph, maps: Mapping[str, ReductionMap]) -> dict[str, Tensor]:
    """Every tensor of a network after the maps."""
    tensors = {name: t.detach() for name, t in named_tensors(model).items()}
    return {name: t.clone() for name, t in (tensors | reduce_weights(tensors, graph, maps)).items()}


def _find_gains(small_seen: Layer, small_own: Layer, seen: Layer, own: Layer, merge: Tensor | None) -> Tensor:
    """What a change on noise is worth in the network with its own statistics, per output channel of a layer.

    The norm behind the layer gives slope * output. With its slopes in the smaller network, seen on noise and with its
    own statistics, and in the original likewise, averaged along the merge: 1 where channels are selected.
    """
    rows = torch.ones(small_own.outputs, dtype=torch.float64, device=small_own.module.weight.device)
    if small_seen.norm is None or small_own.norm is None or seen.norm is None or own.norm is None:
        return rows
    ratio = _divide(own.norm.slope, seen.norm.slope)
    ratio = ratio if merge is None else mean_weights(merge.to(ratio)) @ ratio
    return ratio * _divide(small_seen.norm.slope, small_own.norm.slope)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 1 where that means nothing."""
    return torch.where(b != 0, a / torch.where(b != 0, b, 1.0), 1.0)
