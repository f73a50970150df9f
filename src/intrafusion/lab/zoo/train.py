"""The seeded training loop: cross-entropy, SGD or Adam, cosine learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from intrafusion.errors import unknown_name
from intrafusion.lab.zoo.data import load_data
from intrafusion.lab.zoo.images import Images
from intrafusion.lab.zoo.registry import build

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float, float], Optimizer]] = {
    "sgd": lambda parameters, lr, decay: SGD(parameters, lr, momentum=0.9, nesterov=True, weight_decay=decay),
    "adam": lambda parameters, lr, decay: Adam(parameters, lr, weight_decay=decay),
}


def train_(
    model: nn.Module,
    data: Images,
    *,
    epochs: int,
    batch_size: int = 128,
    optimizer: Literal["sgd", "adam"] = "sgd",
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    seed: int = 0,
) -> list[float]:
    """Train in place and return the mean loss of each epoch; modules keep their train or eval mode afterwards.

    The learning rate falls from `lr` to 0 along half a cosine, step by step. Each epoch takes the images in a new
    random order and leaves out what does not fill a batch. The same seed gives the same weights, bit for bit, on one
    machine with one number of threads; the random numbers of the program are left alone.

    Raises:
        ValueError: unknown optimizer, or no images, epochs or batch size.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(unknown_name("optimizer", optimizer, OPTIMIZERS))
    if min(len(data), epochs, batch_size) < 1:
        raise ValueError(f"expected at least 1 each, got {len(data)} images, {epochs=}, {batch_size=}.")
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = max(1, len(data) // batch_size)
    stepper = OPTIMIZERS[optimizer](parameters, lr, weight_decay)
    schedule = CosineAnnealingLR(stepper, T_max=epochs * steps)
    modes = {module: module.training for module in model.modules()}
    generator = torch.Generator().manual_seed(seed)
    try:
        model.train()
        with torch.random.fork_rng(devices=sorted({p.device.index for p in parameters if p.is_cuda})):
            torch.manual_seed(seed)
            return [_epoch_(model, data, batch_size, steps, stepper, schedule, generator) for _ in range(epochs)]
    finally:
        for module, training in modes.items():
            module.training = training


def _epoch_(
    model: nn.Module,
    data: Images,
    batch_size: int,
    steps: int,
    stepper: Optimizer,
    schedule: CosineAnnealingLR,
    generator: torch.Generator,
) -> float:
    total = 0.0
    order = torch.randperm(len(data), generator=generator)
    for chosen in order.split(batch_size)[:steps]:
        loss = _loss(model, data.images[chosen], data.labels[chosen])
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        schedule.step()
        total += loss.item()
    return total / steps


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    reference = next(model.parameters())
    logits = model(images.to(reference))
    return F.cross_entropy(logits, labels.to(reference.device))


def trained_digits(*, seed: int = 0) -> nn.Module:
    """The zoo's `digits_resnet`, trained on the digits for a few seconds on one processor core; needs no file."""
    model = build("digits_resnet", seed=seed)
    with _one_thread():  # faster for 8 x 8 images, and the same weights whatever the number of cores
        train_(model, load_data("digits_resnet", "train"), epochs=10, batch_size=64, lr=0.05, seed=seed)
    return model


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
