"""A network as a `torch.export` program: it runs without the code that it was made from."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from intrafusion.errors import FolderError, IntrafusionError, ModelError
from intrafusion.network.double import output_difference
from intrafusion.network.inputs import Inputs
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import copy_model

PROGRAM = "program.pt2"
_BATCHES = (1, 7)
"""Sizes that a program must run on where it takes any."""
_TRACED = 3
_TOLERANCE = 1e-4


class Program(nn.Module):
    """A network that was loaded from a program: it computes, in evaluation mode only, and has the saved weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of how PyTorch copies its own programs
            return Program(copy.deepcopy(self.network, memo))

    def train(self, mode: bool = True) -> Program:
        """
        Raises:
            ModelError: training mode is asked for.
        """
        if mode:
            raise ModelError(
                "a program computes as in evaluation mode and has no other; load the network onto its class to train."
            )
        return self


def export_network(model: nn.Module, inputs: Inputs) -> tuple[bytes, bool]:
    """The content of a .pt2 file without the example inputs, and whether it takes batches of every size.

    It is in evaluation mode and on the CPU. Its first dimension of every input is free where the network has none that
    depends on it; the program is compared with the network.

    Raises:
        ModelError: `torch.export` does not take the network, or makes another one of it.
    """
    core = copy_model(model).cpu()
    given = inputs.copied().map(lambda t: t.cpu())
    with preserve_state(core), warnings.catch_warnings(action="ignore"):
        if _has_batch(given):
            with contextlib.suppress(Exception):  # a network of one batch size
                return _export(core, given, free=True), True
        try:
            return _export(core, given, free=False), False
        except IntrafusionError:
            raise
        except Exception as error:  # whatever tracing makes a forward raise
            lines = str(error).strip().splitlines() or [""]
            raise ModelError(
                f"save: program=True, but torch.export does not take {type(model).__name__} "
                f"({type(error).__name__}: {lines[0][:300]}); save without a program, and load onto the class."
            ) from error


def _export(model: nn.Module, inputs: Inputs, *, free: bool) -> bytes:
    given = _with_batch(inputs, _TRACED) if free else inputs
    batch = torch.export.Dim("batch", min=1)
    shapes = lambda value: tree_map(lambda x: {0: batch} if isinstance(x, Tensor) else None, value)  # noqa: E731
    args, kwargs = tuple(given.args), dict(given.kwargs or {})
    free_shapes = shapes(dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)) if free else None
    program = torch.export.export(model, args, kwargs, dynamic_shapes=free_shapes, strict=False)
    program._example_inputs = None  # they may be somebody's data
    file = io.BytesIO()
    torch.export.save(program, file)
    content = file.getvalue()
    loaded = _read(content).module()
    for case in [_with_batch(inputs, size) for size in _BATCHES] if free else [inputs]:
        _compare(loaded, model, case)
    return content


def _compare(program: nn.Module, model: nn.Module, inputs: Inputs) -> None:
    found, expected = inputs.call(program), inputs.call(model)
    if len(found) != len(expected) or not output_difference(found, expected) <= _TOLERANCE:
        raise ModelError(
            f"save: program=True, but what torch.export makes of {type(model).__name__} gives other outputs; "
            "it draws random numbers or keeps a state. Save without a program, and load onto the class."
        )


def _has_batch(inputs: Inputs) -> bool:
    """Whether all inputs are tensors of one first dimension."""
    sizes = {t.shape[0] if t.dim() else None for t in inputs.tensors()}
    return len(sizes) == 1 and None not in sizes and 0 not in sizes


def _with_batch(inputs: Inputs, size: int) -> Inputs:
    return inputs.varied().map(lambda t: t[torch.arange(size) % len(t)])


def _read(content: bytes) -> torch.export.ExportedProgram:
    return torch.export.load(io.BytesIO(content))


def read_program(path: Path, content: bytes, state: Mapping[str, Tensor]) -> Program:
    """
    Args:
        state: the weights beside it, which must be its own.
    Raises:
        FolderError: it is damaged, or has other weights.
    """
    try:
        program = _read(content)
        network = program.module()
    except Exception as error:  # it passes on whatever a damaged file makes its readers raise
        raise FolderError(f"{path}: no program, or a damaged one ({type(error).__name__}: {error}).") from error
    for name, tensor in program.state_dict.items():
        if name in state and not _is_equal(tensor, state[name]):
            raise FolderError(f"{path}: its {name!r} is not that of the weights beside it; save the folder again.")
    return Program(network)


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
