"""What a network is before and after a method ran on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.checks.laws import describe_kind
from intrafusion.network.tensors import named_tensors


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a network is apart from its numbers, by name, and the numbers."""

    described: dict[str, str]
    values: dict[str, Tensor]

    __repr__ = show_briefly


def take_snapshot(model: nn.Module) -> Snapshot:
    tensors = named_tensors(model)
    described = {
        f"tensor {n}": f"{describe_kind(t)} on {t.device}, object {id(t)}, {_flags_of(t)}" for n, t in tensors.items()
    }
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        described[f"module {name!r}"] = f"{type(module).__name__}, training {module.training}, {hooks} hooks"
    return Snapshot(described, {n: t.detach().clone() for n, t in tensors.items()})


def _flags_of(tensor: Tensor) -> str:
    return f"requires_grad {tensor.requires_grad}, grad {None if tensor.grad is None else describe_kind(tensor.grad)}"


class other_random_numbers:
    """The program's random numbers are elsewhere inside, and where they were afterwards."""

    def __enter__(self) -> None:
        import numpy as np

        self.torch, self.numpy = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
        torch.manual_seed(987_654_321)
        np.random.seed(987_654_321)  # noqa: NPY002

    def __exit__(self, *_: object) -> None:
        import numpy as np

        torch.set_rng_state(self.torch)
        np.random.set_state(self.numpy)  # noqa: NPY002


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in mappings, sequences and dataclasses, by path."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from tensors_in(entry, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from tensors_in(entry, f"{name}[{index}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name), f"{name}.{field.name}")


def copy_tensors(value: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors_in(value)}
