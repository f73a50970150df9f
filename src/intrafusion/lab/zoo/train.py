"""The network of the zoo that is trained on the spot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from intrafusion.arguments import Seed, checked
from intrafusion.lab.zoo.data import load_data
from intrafusion.lab.zoo.registry import build
from intrafusion.train import Training, train_

_DIGITS = Training(
    epochs=10,
    batch_size=64,
    optimizer="nesterov",
    lr=0.05,
    weight_decay=5e-4,
    warmup=0.0,
    decay="cosine",
    shuffle="stream",
)


@checked
def train_digits(*, seed: Seed = 0) -> nn.Module:
    """The zoo's `digits_resnet`, trained on the digits for a few seconds on one processor core; needs no file."""
    model = build("digits_resnet", seed=seed)
    with _one_thread():  # faster for 8 x 8 images, and the same weights whatever the number of cores
        train_(model, load_data("digits_resnet", "train"), replace(_DIGITS, seed=seed))
    return model


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
