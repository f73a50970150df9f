"""Restoration without data: least squares on random shapes, with every batch norm made to see what it expects."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from intrafusion.arguments import Seed, checked
from intrafusion.brief import show_briefly
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

_RADII = 0.035, 0.45  # of shapes, the least and the largest, as fractions of an image's shorter side
_NARROW = 0.4  # the least of an axis of a shape, as a fraction of its radius
_TEXTURE = 0.3  # how much of the field is seen in a shape, whose colours have deviation 1

T = TypeVar("T")
Watch = Callable[[nn.Module], contextlib.AbstractContextManager[object]]


@checked
@dataclass(frozen=True)
class Noise:
    r"""Least squares without data, in seconds: the images are noise, and every batch norm standardises its input.

    Neighbouring pixels of natural images are alike, and differ where one thing ends and another begins: the noise is of
    shapes that hide each other, see `scatter_shapes`, on a Gaussian field with amplitude 1 / f^slope at the spatial
    frequency f, of mean 0 and deviation 1 in all; with fewer than two spatial dimensions the field alone. On it, both
    networks run with the statistics of the noise in their batch norms,
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
        cover: how often the shapes cover an image; 0 for the field alone.
        likeness: correlation of the channels of an image, such as its colours.

    Reference: images of shapes that hide each other: Matheron 1968, with radii r of density 1 / r^3: Lee, Mumford and
        Huang 2001; that networks learn more from them than from fields of the right spectrum: Baradad et al. 2021.
    """

    strength: float = 1e-3
    scarcity: float = 2.0
    steps: int = 3
    rows: int = 20_000
    drift: bool = True
    seed: Seed = 0
    images: int = 512
    slope: float = 1.5
    cover: float = 10.0
    likeness: float = 0.8

    needs_data = False  # of the class, not a hyper-parameter

    __repr__ = show_briefly

    def __post_init__(self) -> None:
        self.solver  # noqa: B018  # refuses hyper-parameters that mean nothing
        if self.images < 2:
            raise RecipeError(f"images: expected at least 2, got {self.images!r}.")
        if not 0 <= self.cover < math.inf:
            raise RecipeError(f"cover: expected a number >= 0, got {self.cover!r}.")
        if not 0 <= self.likeness < 1:
            raise RecipeError(f"likeness: expected a number in [0, 1), got {self.likeness!r}.")

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
        field = smooth(torch.randn(count, *like.shape[1:], generator=generator), self.slope)
        noise = self.paint(field, generator).to(like)
        return Inputs.of(example_inputs).map(lambda t: noise if t is like else t)

    def paint(self, field: Tensor, generator: torch.Generator) -> Tensor:
        """Shapes on a field (n, c, *spatial), alike in its channels, deviation 1; what is no picture stays as it is."""
        if field.dim() < 4:  # a signal, or tokens, whose features are no neighbours
            return field
        painted = correlate_channels(scatter_shapes(field, self.cover, generator), self.likeness)
        return painted / painted.std()


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


def scatter_shapes(field: Tensor, cover: float, generator: torch.Generator) -> Tensor:
    """Ellipses and boxes of one colour each, and a little of the field in it, on the field (n, c, *spatial).

    One after another hides what it falls on; those that leave at one side come in at the other. Every image has the
    same sizes, with as many of half the size as fill as much space, and places, shapes and colours of its own.

    Args:
        cover: how often balls of their size would cover the image.
    """
    n, c, *shape = field.shape
    below, painted = field.flatten(2), field.flatten(2).clone()
    for radius in _draw_radii(shape, cover, generator):
        places, inside = _place_shape(n, shape, radius, generator)
        at = places[:, None].expand(-1, c, -1)
        new = torch.randn(n, c, 1, generator=generator) + _TEXTURE * below.gather(2, at)
        painted.scatter_(2, at, torch.where(inside[:, None], new, painted.gather(2, at)))
    return painted.view_as(field)


def _draw_radii(shape: Sequence[int], cover: float, generator: torch.Generator) -> list[float]:
    """Of density r^-(d + 1) between two bounds, in any order; none where images are too small for shapes."""
    d, low, high = len(shape), *(part * min(shape) for part in _RADII)
    low = max(low, 1.0)
    if low >= high:
        return []
    span = low**-d - high**-d
    ball = math.pi ** (d / 2) / math.gamma(d / 2 + 1) * d * math.log(high / low) / span  # the mean volume
    count = round(cover * math.prod(shape) / ball)
    parts = (torch.randperm(count, generator=generator) + 0.5) / max(1, count)
    return (low**-d - parts * span).pow(-1 / d).tolist()


def _place_shape(n: int, shape: Sequence[int], radius: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A shape in each of n images: the positions around its middle (n, p), of which some are inside, (n, p)."""
    d, line = len(shape), torch.arange(-int(radius), int(radius) + 1)
    around = torch.cartesian_prod(*[line] * d).view(-1, d)
    sizes = torch.tensor(shape)
    middles = (torch.rand(n, 1, d, generator=generator) * sizes).long()
    steps = sizes.flip(0).cumprod(0).flip(0) // sizes
    turns, _ = torch.linalg.qr(torch.randn(n, d, d, generator=generator))
    axes = radius * (_NARROW + (1 - _NARROW) * torch.rand(n, 1, d, generator=generator))
    found = ((around.float() @ turns) / axes).abs()
    is_box = torch.rand(n, 1, generator=generator) < 0.5
    inside = torch.where(is_box, found.amax(2), found.square().sum(2)) < 1
    places, *more = ((middles + line[:, None]) % sizes * steps).unbind(2)  # along each dimension, (n, 2 r + 1)
    for along in more:
        places = (places[:, :, None] + along[:, None]).flatten(1)
    return places, inside


def correlate_channels(images: Tensor, likeness: float) -> Tensor:
    """Independent channels (n, c, ...) of one variance, so that every two of them correlate as `likeness`."""
    mean, count = images.mean(1, keepdim=True), images.shape[1]
    return (1 - likeness) ** 0.5 * (images - mean) + (1 - likeness + likeness * count) ** 0.5 * mean


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
