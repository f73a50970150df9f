"""Images made from a network alone, by matching what its batch norms remember, or what its layers give on noise."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from intrafusion.arguments import Seed, checked
from intrafusion.brief import show_briefly
from intrafusion.errors import FolderError, NoInputsError, RecipeError, show
from intrafusion.io.atomic import atomic_file, report_unreadable
from intrafusion.io.tensors import detach_dense, read_tensors
from intrafusion.network.apart import borrow
from intrafusion.network.batches import cast_like, channels_last
from intrafusion.network.free_memory import MemoryLike, choose_memory, read_memory
from intrafusion.network.inputs import ExampleInputs, Inputs, output_tensors, told_of
from intrafusion.network.layers import is_convolution_or_linear, watch_calls
from intrafusion.network.rows_apart import is_row_by_row
from intrafusion.network.state import preserve_state
from intrafusion.progress import ShowProgress, report, shows_progress
from intrafusion.restore.image_parts import (
    Look,
    Statistics,
    choose_part,
    differentiate,
    differentiate_in_parts,
)
from intrafusion.restore.noise import Noise, batch_norms, image_like

_TINY = 1e-12  # added to variances where batch norm divides by them


@checked
@dataclass(frozen=True)
class Synthesis:
    r"""Make calibration images out of a network, without data.

    From noise, Adam on the pixels minimises

        cross-entropy to arbitrary labels  +  statistics * sum over batch norms of
            mean_c ((mu_batch - mu) / sigma)^2 + mean_c (sigma_batch / sigma - 1)^2  +  smoothness * total variation

    and every step rolls the images by up to `roll` pixels. Without a row of class scores as the only output, the first
    term is left out. Without batch norms, the sum goes over the outputs of all convolutions and linear layers, whose mu
    and sigma are taken from smooth noise (`Noise`, without shapes): the images stay in the range of such inputs and
    mean something.

    Attributes:
        images: how many are made.
        mirrored: add the mirror image (last dimension) of each, where there are at least two spatial dimensions. Twice
            as many images in all, for no more steps.
        steps: of Adam; fewer if `seconds` are over first.
        lr: of Adam.
        seconds: budget of time, None for none. With a budget the result depends on the machine.

    Reference: the idea is that of Yin et al. 2020 (DeepInversion), Eq. 2 to 4; the exact terms are OURS.
    """

    images: int = 128
    mirrored: bool = True
    steps: int = 250
    lr: float = 0.1
    statistics: float = 1.0
    smoothness: float = 0.1
    roll: int = 2
    seconds: float | None = None
    seed: Seed = 0

    __repr__ = show_briefly

    def __post_init__(self) -> None:
        if self.images < 2 or self.steps < 1:
            raise RecipeError(f"expected at least 2 images and 1 step, got {self.images} and {self.steps}.")

    @checked
    @shows_progress("synthesis")
    def __call__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        *,
        memory: MemoryLike = None,
        progress: ShowProgress = None,
    ) -> Tensor:
        """The images (n, ...), on the device and in the precision of the example; the network is left as it was.

        Args:
            example_inputs: one call of the network with a single floating-point tensor; gives the shape of an image.
            memory: bytes, or text such as "2GB", that a step may take: fewer images go through the network at a time
                where all take more, with the same result up to rounding. None: half of what is free.
        Raises:
            RecipeError: less memory than one image takes.
            NoInputsError: the network does not take a single image tensor, or has no batch norm and no layer with
                weights, or its forward takes no gradients.
            ModelError: it does not run on such images.
        """
        like, model = image_like(example_inputs), borrow(model)
        wanted = read_norms(model) or watch_noise(model, example_inputs, self.seed)
        if not wanted:
            raise NoInputsError(
                "images can be made only from batch norms, convolutions or linear layers; there are none."
            )
        generator = torch.Generator().manual_seed(self.seed)
        pixels = torch.randn(self.images, *like.shape[1:], generator=generator).to(like).requires_grad_()
        optimizer = torch.optim.Adam([pixels], lr=self.lr)
        end = float("inf") if self.seconds is None else time.monotonic() + self.seconds
        most, turned = choose_memory(read_memory(memory)), bool(Inputs.of(example_inputs).turned)
        look = partial(self.look, model, wanted, turned=turned)
        with preserve_state(model), torch.enable_grad():
            size = choose_part(look, channels_last(pixels.detach()), most)
            few = Inputs.of(example_inputs).map(lambda t: pixels[:4].detach() if t is like else t)
            if size < self.images and not is_row_by_row(model, few):
                size = self.images
            for step in range(self.steps):
                report("making images", step, self.steps)
                pixels.grad = self.differentiate(look, pixels, size, generator)
                optimizer.step()
                if time.monotonic() > end:
                    break
        report("making images", self.steps, self.steps)
        return self.mirror(pixels.detach())

    def mirror(self, images: Tensor) -> Tensor:
        """The images and, if they are to be `mirrored`, their mirror images."""
        return torch.cat([images, images.flip(-1)]) if self.mirrored and images.dim() > 3 else images

    def differentiate(self, look: Look, pixels: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """The gradient of the loss on the pixels, that were moved by chance; so many images at a time."""
        images = channels_last(self.roll_pixels(pixels, generator))
        if size < len(images):
            found = differentiate_in_parts(images.detach(), size, look, self.measure)
            return torch.autograd.grad(images, pixels, found)[0]
        statistics, rest = look(images, slice(0, len(images)))
        return differentiate(self.measure(statistics) + rest, pixels)

    def look(
        self, model: nn.Module, wanted: Sequence[ChannelStatistics], pixels: Tensor, own: slice, *, turned: bool
    ) -> tuple[Statistics, Tensor]:
        """What some images, which are these of all, give, and what is lost besides; a `Look`."""
        told = told_of(model, Inputs((pixels,), source="the images that are made"))
        with collect_statistics(wanted) as found, told:
            given = pixels.transpose(0, 1) if turned else pixels
            outputs = output_tensors(model(given.clone()))  # a forward may write into its input
        rest = self.smoothness * total_variation(pixels)
        if (
            len(outputs) == 1
            and outputs[0].dim() == 2
            and outputs[0].shape[1] > 1
            and bool(outputs[0].isfinite().all())
        ):
            labels = torch.arange(own.start, own.stop, device=pixels.device) % outputs[0].shape[1]
            rest = rest + F.cross_entropy(outputs[0], labels)
        return found, rest

    def measure(self, found: Statistics) -> Tensor:
        """How far statistics are from those that are wanted."""
        return self.statistics * torch.stack([one.measure_mismatch(*both) for one, *both in found]).sum()

    def roll_pixels(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        dims = tuple(range(2, pixels.dim()))
        moves = torch.randint(-self.roll, self.roll + 1, (len(dims),), generator=generator).tolist()
        return torch.roll(pixels, moves, dims) if dims else pixels


def total_variation(pixels: Tensor) -> Tensor:
    """Sum over the spatial dimensions of the mean squared difference of neighbours."""
    differences = [pixels.diff(dim=d).square().mean() for d in range(2, pixels.dim()) if pixels.shape[d] > 1]
    return torch.stack(differences).sum() if differences else pixels.new_zeros(())


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """Mean and deviation (c,) of the channels, along a dimension, of what a module reads, or else gives."""

    module: nn.Module
    mean: Tensor
    deviation: Tensor
    dim: int = 1
    reads: bool = True

    __repr__ = show_briefly

    def measure_mismatch(self, mean: Tensor, variance: Tensor) -> Tensor:
        deviation = _find_deviation(variance)
        off = (mean - self.mean) / self.deviation
        return off.square().mean() + (deviation / self.deviation - 1).square().mean()


class _MeanAndVariance(torch.autograd.Function):
    """Mean and variance (c,) of the channels of x (n, c, ...), in the one pass that batch norm takes for them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        _, mean, scale = torch.native_batch_norm(x, None, None, None, None, True, 0.0, _TINY)
        ctx.save_for_backward(x, mean)
        return mean, scale.pow(-2) - _TINY

    @staticmethod
    def backward(ctx: Any, mean_gradient: Tensor, variance_gradient: Tensor) -> Tensor:  # type: ignore[override]
        x, mean = ctx.saved_tensors
        rows, shape = x.numel() // x.shape[1], (-1, *[1] * (x.dim() - 2))
        slope = 2 * variance_gradient / rows
        return x * slope.to(x).view(shape) + (mean_gradient / rows - slope * mean).to(x).view(shape)


def take_statistics(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of the channels."""
    return _MeanAndVariance.apply(x if dim == 1 else x.movedim(dim, -1).flatten(0, -2))


def _find_deviation(variance: Tensor) -> Tensor:
    return variance.clamp(min=1e-8).sqrt()


def read_norms(model: nn.Module) -> list[ChannelStatistics]:
    """What the batch norms of a network remember of their inputs."""
    found = []
    for norm in batch_norms(model):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        found.append(ChannelStatistics(norm, norm.running_mean, (norm.running_var + norm.eps).sqrt()))
    return found


def watch_noise(model: nn.Module, example_inputs: ExampleInputs, seed: int) -> list[ChannelStatistics]:
    """What the convolutions and linear layers of a network give on smooth noise, the last time that they run."""
    found: dict[nn.Module, ChannelStatistics] = {}

    def called(module: nn.Module, x: Tensor, output: Tensor) -> None:
        dim = -1 if isinstance(module, nn.Linear) else 1
        mean, variance = take_statistics(output, dim)
        found[module] = ChannelStatistics(module, mean, _find_deviation(variance), dim, reads=False)

    inputs = Noise(cover=0.0, likeness=0.0, seed=seed).make(example_inputs)
    with preserve_state(model), watch_calls({m: m for m in filter(is_convolution_or_linear, model.modules())}, called):
        inputs.call(model)
    return list(found.values())


def find_mismatch(model: nn.Module, images: Inputs) -> float:
    """How far what batch norms read of images is from what they remember: the mean over them of their part of the loss.

    Raises:
        ModelError: the network does not run on these images.
    """
    with preserve_state(model), collect_statistics(read_norms(model)) as found, torch.no_grad():
        cast_like(images.map(channels_last), model).call(model)
    off = [one.measure_mismatch(mean, variance) for one, mean, variance in found]
    return float(torch.stack(off).mean()) if off else math.nan


@contextlib.contextmanager
def collect_statistics(
    wanted: Sequence[ChannelStatistics],
) -> Iterator[list[tuple[ChannelStatistics, Tensor, Tensor]]]:
    """Collects mean and variance, with what is wanted, each time that one of these modules runs inside."""
    found: list[tuple[ChannelStatistics, Tensor, Tensor]] = []

    def called(one: ChannelStatistics, x: Tensor, output: Tensor) -> None:
        found.append((one, *take_statistics(x if one.reads else output.clone(), one.dim)))  # it may change in place

    with watch_calls({one: one.module for one in wanted}, called, history=True):
        yield found


@checked
def save_images(images: Tensor, path: str | os.PathLike[str], synthesis: Synthesis | None = None) -> None:
    """Write images as safetensors, with how they were made."""
    how = {} if synthesis is None else {name: str(value) for name, value in asdict(synthesis).items()}
    with atomic_file(path) as temporary:
        save_file({"images": detach_dense("images", images)}, temporary, metadata=how)


@checked
def load_images(path: str | os.PathLike[str]) -> Tensor:
    """Read what `save_images` wrote.

    Raises:
        FolderError: no such file, or not one of ours.
    """
    path = Path(path)
    with report_unreadable(path):
        if not path.is_file():
            raise FolderError(f"{path}: expected images saved by intrafusion, found no such file; check its name.")
        tensors = read_tensors(path)
    if "images" not in tensors:
        raise FolderError(f"{path}: expected images saved by intrafusion, got {show([*tensors])}; see save_images.")
    return tensors["images"]
