"""Images that contradict the network, or the example: on another scale, or all the same. OURS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from intrafusion.errors import ModelError
from intrafusion.network.batches import cast_like, join_batches
from intrafusion.network.inputs import Inputs
from intrafusion.network.state import preserve_state
from intrafusion.restore.noise import batch_norms

_FEWEST = 10  # images, below which their spread says little
_OFF = 1 / 0.3
"""Factor by which the spread behind the first layer may differ from what its batch norm remembers.

Of six networks of CIFAR and ImageNet it is 0.7 to 1.2 on 10 to 64 of their own images, on those of one class or of
another data set (CIFAR-100 for CIFAR-10, ImageNet); 0.3 to 0.8 on grey ones, or scaled with 0.5 for the data's own
deviation; 0.2 to 0.3 on CIFAR images between 0 and 1, 23 to 69 on such up to 255, 0.1 and less on constant ones.
"""
_SHIFTED, _NARROW = 0.6, 0.6
"""A shift of the mean, in deviations, with a spread below that, is too much as well.

Likewise, it is 0.05 to 0.25 where images are right; 0.8 to 1 where pixels were divided by 255 twice, with a spread of
0.2 to 0.5 (what is left of it are the borders).
"""
_PIXELS = 32, 65535  # whole numbers up to the first are no pixels from 0 to 255, nor those above 16 bits


def find_implausible(model: nn.Module, sample: Sequence[Inputs], example: Inputs) -> dict[str, str]:
    """Notes on images that cannot be meant, by kind; none where the network is used to such images.

    Args:
        sample: calls of the network with some of the images.
        example: the example inputs.
    """
    try:
        call = join_batches(list(sample))
    except (ModelError, IndexError):  # whoever needs all of them as one batch says so
        return {}
    images = next((t for t in call.tensors() if t.is_floating_point()), None)
    if images is None or images.dim() < 2 or len(images) < _FEWEST:
        return {}
    if bool((images == images[:1]).all()):
        return {"same": f"images: the first {len(images)} are all the same; look at how they are read"}
    spread = _compare_spread(model, call)
    if spread is not None:
        return {} if spread.is_plausible else {"scale": f"images: {_describe_range(images)}; {spread}. {_REMEDY}"}
    like = next((t for t in example.tensors() if t.is_floating_point()), None)
    if _are_pixels(images) and like is not None and not _are_pixels(like):
        whole = f"{_describe_range(images)}, all whole numbers, where those of the example inputs are not"
        return {"scale": f"images: {whole}. {_REMEDY}"}
    return {}


_REMEDY = "Normalise images as the network was trained on them"


@dataclass(frozen=True)
class _Spread:
    """How far what reaches the first batch norm spreads, channel by channel, over what the norm remembers.

    Attributes:
        mean: geometric mean over the channels.
        median: over the channels; a few may be still, as those that see colours are on grey images.
        shift: root mean square over the channels of what the mean is off, in deviations that the norm remembers.
    """

    norm: str
    mean: float
    median: float
    shift: float

    @property
    def is_plausible(self) -> bool:
        is_far = min(self.mean, self.median) > _OFF or max(self.mean, self.median) < 1 / _OFF
        return not (is_far or (self.shift > _SHIFTED and max(self.mean, self.median) < _NARROW))

    def __str__(self) -> str:
        spread = f"spreads {self.mean:.2g} times as far as in training"
        return f"what reaches the first batch norm ({self.norm}) {spread}, around means {self.shift:.2g} deviations off"


def _compare_spread(model: nn.Module, call: Inputs) -> _Spread | None:
    """None where no batch norm that has seen data is reached."""
    used = [m for m in batch_norms(model) if not _is_new(m)]
    found: list[tuple[_BatchNorm, Tensor]] = []

    def stop(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        found.append((norm, args[0].detach()))
        raise _Reached

    handles = [norm.register_forward_pre_hook(stop) for norm in used]
    try:
        with preserve_state(model):
            cast_like(call, model).run(model) if used else None
    except (_Reached, ModelError):  # whoever needs the outputs says what is wrong
        pass
    finally:
        for handle in handles:
            handle.remove()
    return next((_spread_of(model, *pair) for pair in found), None)


class _Reached(BaseException):
    """The first batch norm: the rest of the forward pass is of no interest. No network catches it by accident."""


def _is_new(norm: _BatchNorm) -> bool:
    """Whether its statistics are those that it was made with."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return not bool(norm.running_mean.any()) and bool((norm.running_var == 1).all())


def _spread_of(model: nn.Module, norm: _BatchNorm, x: Tensor) -> _Spread:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    name = next(n for n, m in model.named_modules() if m is norm)
    variance, mean = torch.var_mean(x.double(), [0, *range(2, x.dim())], correction=0)
    remembered = (norm.running_var.double() + norm.eps).sqrt()
    ratio, shift = (variance + norm.eps).sqrt() / remembered, (mean - norm.running_mean) / remembered
    return _Spread(name, float(ratio.log().mean().exp()), float(ratio.median()), float(shift.square().mean().sqrt()))


def _are_pixels(images: Tensor) -> bool:
    least, most = _PIXELS
    return bool((images == images.round()).all()) and least <= float(images.max()) <= most


def _describe_range(images: Tensor) -> str:
    low, high = (float(v) for v in torch.aminmax(images))
    return f"values from {low:.3g} to {high:.3g}"
