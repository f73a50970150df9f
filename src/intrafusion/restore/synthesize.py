"""Images made from a network alone, by matching the statistics that its batch norms remember."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from intrafusion.errors import FolderError, ModelError
from intrafusion.inputs import ExampleInputs, output_tensors
from intrafusion.progress import Progress, silent
from intrafusion.restore.noise import batch_norms, image_like
from intrafusion.trace.state import preserved


@dataclass(frozen=True)
class Synthesis:
    r"""Make calibration images out of a network with batch norms, without data.

    From noise, Adam on the pixels minimises

        cross-entropy to arbitrary labels  +  statistics * sum over batch norms of
            mean_c ((mu_batch - mu) / sigma)^2 + mean_c (sigma_batch / sigma - 1)^2  +  smoothness * total variation

    and every step rolls the images by up to `roll` pixels. Without a row of class scores as the only output, the first
    term is left out.

    Attributes:
        images: how many.
        steps: of Adam; fewer if `seconds` are over first.
        lr: of Adam.
        seconds: budget of time, None for none. With a budget the result depends on the machine.

    Reference: the idea is that of Yin et al. 2020 (DeepInversion), Eq. 2 to 4; the exact terms are OURS.
    """

    images: int = 128
    steps: int = 250
    lr: float = 0.1
    statistics: float = 1.0
    smoothness: float = 0.1
    roll: int = 2
    seconds: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images < 2 or self.steps < 1:
            raise ValueError(f"expected at least 2 images and 1 step, got {self.images} and {self.steps}.")

    def __call__(self, model: nn.Module, example_inputs: ExampleInputs, *, progress: Progress = silent) -> Tensor:
        """The images (n, ...), on the device and in the precision of the example; the network is left as it was.

        Args:
            example_inputs: one call of the network with a single floating-point tensor; gives the shape of an image.
        Raises:
            ModelError: the network has no batch norm with statistics, or does not take a single image tensor.
        """
        like = image_like(example_inputs)
        norms = batch_norms(model)
        if not norms:
            raise ModelError("images can be made only from batch norms that remember statistics, and there are none.")
        generator = torch.Generator().manual_seed(self.seed)
        pixels = torch.randn(self.images, *like.shape[1:], generator=generator).to(like).requires_grad_()
        optimizer = torch.optim.Adam([pixels], lr=self.lr)
        end = float("inf") if self.seconds is None else time.monotonic() + self.seconds
        with preserved(model), torch.enable_grad():
            for step in range(self.steps):
                progress("images", step, self.steps)
                pixels.grad = torch.autograd.grad(self.loss(model, norms, self.rolled(pixels, generator)), pixels)[0]
                optimizer.step()
                if time.monotonic() > end:
                    break
        progress("images", self.steps, self.steps)
        return pixels.detach()

    def work(self, macs: float) -> float:
        """Multiply-accumulates in all, for a network that needs `macs` for one image: forward, and twice that back."""
        return 3 * macs * self.images * self.steps

    def loss(self, model: nn.Module, norms: list[_BatchNorm], pixels: Tensor) -> Tensor:
        with mismatches(norms) as found:
            outputs = output_tensors(model(pixels))
        total = self.statistics * torch.stack(found).sum() + self.smoothness * total_variation(pixels)
        if len(outputs) == 1 and outputs[0].dim() == 2 and outputs[0].shape[1] > 1:
            labels = torch.arange(len(pixels), device=pixels.device) % outputs[0].shape[1]
            total = total + F.cross_entropy(outputs[0], labels)
        return total

    def rolled(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        dims = tuple(range(2, pixels.dim()))
        moves = torch.randint(-self.roll, self.roll + 1, (len(dims),), generator=generator).tolist()
        return torch.roll(pixels, moves, dims) if dims else pixels


def total_variation(pixels: Tensor) -> Tensor:
    """Sum over the spatial dimensions of the mean squared difference of neighbours."""
    differences = [pixels.diff(dim=d).square().mean() for d in range(2, pixels.dim()) if pixels.shape[d] > 1]
    return torch.stack(differences).sum() if differences else pixels.new_zeros(())


@contextlib.contextmanager
def mismatches(norms: list[_BatchNorm]) -> Iterator[list[Tensor]]:
    """Collects, for each batch norm that runs inside, how far its input's statistics are from what it remembers."""
    found: list[Tensor] = []

    def seen(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, _BatchNorm)
        assert module.running_mean is not None
        assert module.running_var is not None
        x, sigma = args[0], (module.running_var + module.eps).sqrt()
        dims = [d for d in range(x.dim()) if d != 1]
        mean = x.mean(dims)
        spread = x.var(dims, unbiased=False).clamp(min=1e-8).sqrt()
        found.append(((mean - module.running_mean) / sigma).square().mean() + (spread / sigma - 1).square().mean())

    with contextlib.ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(seen).remove)
        yield found


def save_images(images: Tensor, path: str | os.PathLike[str], synthesis: Synthesis | None = None) -> None:
    """Write images as safetensors, with how they were made."""
    how = {} if synthesis is None else {name: str(value) for name, value in asdict(synthesis).items()}
    save_file({"images": images.contiguous()}, Path(path), metadata=how)


def load_images(path: str | os.PathLike[str]) -> Tensor:
    """Read what `save_images` wrote.

    Raises:
        FolderError: no such file, or not one of ours.
    """
    try:
        return load_file(Path(path))["images"]
    except (OSError, SafetensorError, KeyError) as error:
        message = f"{path}: expected images saved by intrafusion, got {type(error).__name__}: {error}."
        raise FolderError(message) from error
