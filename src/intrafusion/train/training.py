"""What a training is told and what it tells: its hyper-parameters, its data, the course of its epochs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from intrafusion.arguments import Count, Natural, NotNegative, Positive, Seed, checked
from intrafusion.brief import show_briefly
from intrafusion.errors import ArgumentError, unknown_name
from intrafusion.train.adapters import kinds_of

_OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float, float], Optimizer]] = {
    "adamw": lambda parameters, lr, decay: AdamW(parameters, lr, weight_decay=decay),
    "adam": lambda parameters, lr, decay: Adam(parameters, lr, weight_decay=decay),
    "sgd": lambda parameters, lr, decay: SGD(parameters, lr, momentum=0.9, weight_decay=decay),
    "nesterov": lambda parameters, lr, decay: SGD(parameters, lr, momentum=0.9, nesterov=True, weight_decay=decay),
}
_DECAYS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda done, halvings: 1 - done,
    "cosine": lambda done, halvings: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done, halvings: 1.0,
    "halving": lambda done, halvings: 0.5**halvings,
}


@runtime_checkable
class Labelled(Protocol):
    """Images (k, ...) and their class numbers (k,), such as `zoo.Images`."""

    @property
    def images(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Unlabelled:
    """Images, or their numbers, with labels that nothing reads; `Labelled`."""

    images: Tensor

    __repr__ = show_briefly

    @property
    def labels(self) -> Tensor:
        return torch.zeros(len(self.images), dtype=torch.long)


@checked
@dataclass(frozen=True)
class Training:
    """How a network is trained.

    Attributes:
        epochs: passes over the data.
        steps: stop after this many updates, whatever is left of the epochs; None for all.
        batch_size: images per update.
        optimizer: "adamw", "adam", "sgd" with momentum 0.9, or "nesterov", the same with Nesterov's momentum.
        lr: largest learning rate.
        weight_decay: of the optimizer.
        warmup: fraction of all updates over which the rate rises from 0.
        decay: of the rate after that: "linear" or "cosine" to 0, "constant", or "halving".
        trainable: "full", "unfrozen" (what requires a gradient), "biases", "norms", "head", "lora", or several joined
            by "+".
        rank: of the low-rank changes, and
        alpha: their weight, alpha / rank.
        accumulate: parts into which each batch is cut to save memory; the update is that of the whole batch.
        precision: "no", "bf16" or "fp16": of the forward pass.
        patience: stop when the validation accuracy has not risen for this many epochs; None for never.
        clip: largest norm of the gradient; None for any.
        seed: of the order of images, of dropout and of low-rank changes.
        halve_every: epochs between two halvings of the rate; 30 as in Theus et al. 2024, fine-tuning.
        drop_last: leave out what does not fill a batch; else it is a batch too, unless it is a single image, from which
            a batch norm has nothing to learn.
        shuffle: "epoch" draws the order of each epoch from a seed of its own, "stream" all orders from one stream.
        evaluating: leave the network in evaluation mode: no dropout, and norms keep their statistics.
        norms: all the same, batch norms take the statistics of each batch and remember what they average to.
        seconds: budget of time, None for none: where it would not do for all updates, the rate falls as it passes, and
            with it the training ends. Then the result depends on the machine.
    """

    epochs: Count = 10
    steps: Count | None = None
    batch_size: Count = 128
    optimizer: str = "adamw"
    lr: NotNegative = 1e-3
    weight_decay: NotNegative = 0.0
    warmup: float = 0.1
    decay: str = "linear"
    trainable: str = "full"
    rank: Count = 32
    alpha: Positive = 16.0
    accumulate: Count = 1
    precision: Literal["no", "bf16", "fp16"] = "no"
    patience: Count | None = None
    clip: Positive | None = None
    seed: Seed = 0
    halve_every: Count = 30
    drop_last: bool = True
    shuffle: Literal["epoch", "stream"] = "epoch"
    evaluating: bool = False
    norms: bool = False
    seconds: Positive | None = None

    __repr__ = show_briefly

    def __post_init__(self) -> None:
        kinds_of(self.trainable)
        self._check_names()
        if not 0 <= self.warmup < 1:
            raise ArgumentError(f"warmup: expected a fraction in [0, 1), got {self.warmup!r}.")

    def _check_names(self) -> None:
        for field, names in {"optimizer": _OPTIMIZERS, "decay": _DECAYS}.items():
            if getattr(self, field) not in names:
                raise ArgumentError(unknown_name(field, getattr(self, field), names))

    @checked
    def build_optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        if not parameters:
            raise ArgumentError(
                "parameters: expected at least one to train, got none; `adapt` gives those of a network."
            )
        return _OPTIMIZERS[self.optimizer](parameters, self.lr, self.weight_decay)

    @checked
    def find_rate(self, step: Natural, total: Count, per_epoch: Count) -> float:
        """Learning rate of update `step` out of `total`, counted from 0: a linear rise, then the decay."""
        rise = round(self.warmup * total)
        if step < rise:
            return self.lr * (step + 1) / rise
        done = (step - rise) / max(1, total - rise)
        return self.lr * _DECAYS[self.decay](done, step / per_epoch // self.halve_every)


@dataclass(frozen=True)
class Epoch:
    """One pass: mean loss, learning rate at its end, seconds it took, and validation accuracy in [0, 1] if measured."""

    loss: float
    lr: float
    seconds: float
    validation: float | None = None


@dataclass(frozen=True)
class History:
    """What a training did.

    Attributes:
        epochs: in order, those before an interruption included.
        trained: number of values that were trained, adapters included.
        steps: updates made.
        best: index of the epoch whose weights the network has now; the last one without validation.
    """

    epochs: tuple[Epoch, ...]
    trained: int
    steps: int
    best: int

    __repr__ = show_briefly

    @property
    def seconds(self) -> float:
        return sum(epoch.seconds for epoch in self.epochs)
