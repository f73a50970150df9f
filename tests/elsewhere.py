"""A second device that every machine has: its tensors say that they are elsewhere, are computed on the CPU, and are
refused, as a GPU refuses them, where an operation also reads tensors of the CPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

import intrafusion.network.layers as layers
from intrafusion.trace.dispatch import is_composite

NAME = "elsewhere"
POSSIBLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
INDEXED = ("aten::index.Tensor", "aten::index_put", "aten::_index_put_impl")


@functools.cache
def device() -> torch.device:
    """Registered when first asked for, as a process can do only once."""
    if not POSSIBLE:
        pytest.skip(f"torch {torch.__version__} takes no device that is written in Python")
    backend = backend_registration._DummyBackendModule()
    backend.get_rng_state = lambda device=None: torch.get_rng_state()
    backend.set_rng_state = lambda state, device=None: None  # set with those of the CPU
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend)
    return torch.device(NAME, 0)


class Elsewhere(Tensor):
    """A tensor there; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=device(), **layout)
        tensor.held = held
        return tensor

    def __repr__(self, **options: Any) -> str:
        return f"Elsewhere({self.held})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__set__:
            args[0].held = args[1].held
        if func == Tensor.tolist:
            return args[0].held.tolist()
        if func == Tensor.to_sparse:
            return args[0]  # a tensor of this kind is dense
        if func == torch.sparse.mm:
            return args[0] @ args[1]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Computing(TorchDispatchMode):
    """Makes tensors elsewhere where that is asked for."""

    def __enter__(self) -> Self:
        self.before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self.before)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_composite(func):
            with self:
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **(kwargs or {}))
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = tensors_in([args, kwargs])
    there = [t for t in tensors if isinstance(t, Elsewhere)]
    wanted = kwargs.get("device")
    goes = bool(there) if wanted is None else torch.device(wanted).type == NAME
    check(func, args, there, tensors)
    if goes and getattr(kwargs.get("generator"), "device", device()).type == "cpu":
        raise RuntimeError(f"{func}: expected a generator elsewhere, got one of the CPU")
    if goes and wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = func(*change(values, args), **change(values, kwargs))
    changed = {id(values(t)): t for t in tensors} if func._schema.is_mutable else {}
    for tensor in there if changed else ():
        if tensor.held.shape != tensor.shape:  # squeeze_ and the like
            with torch._C.DisableTorchFunctionSubclass():
                tensor.data = Elsewhere(tensor.held)
    return change(lambda x: changed.get(id(x), Elsewhere(x) if goes else x), out)


def check(func: Any, args: Any, there: list[Elsewhere], tensors: list[Tensor]) -> None:
    """As a GPU does: single numbers of the CPU are taken, and its tensors to copy and as indices."""
    here = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim()]
    indexed = func.name().startswith(INDEXED) and isinstance(args[0], Elsewhere)
    if there and here and not indexed and func.name() != "aten::copy_":
        shapes = [tuple(t.shape) for t in (there[0], here[0])]
        raise RuntimeError(f"{func}: expected all tensors on one device, got {shapes[0]} elsewhere, {shapes[1]} on cpu")


def values(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, Elsewhere) else tensor


def tensors_in(x: Any) -> list[Tensor]:
    """Arguments of an operation hold tensors in lists, tuples and dicts (a `tree_map` takes three times as long)."""
    found: list[Tensor] = []
    change(found.append, x)
    return found


def change(how: Any, x: Any) -> Any:
    """The same with other tensors."""
    if isinstance(x, Tensor):
        return how(x)
    if isinstance(x, list | tuple):
        return type(x)([change(how, part) for part in x])
    return {name: change(how, part) for name, part in x.items()} if isinstance(x, dict) else x


def moved_(model: nn.Module) -> nn.Module:
    """`model.to(device())`, which needs tensors of the device's own kind."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(Elsewhere(parameter.data), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = Elsewhere(buffer)
    return model


@contextlib.contextmanager
def computing(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device works inside, also where our own hooks switch modes off."""
    hidden = layers._disable_current_modes

    @contextlib.contextmanager
    def out_of_sight() -> Iterator[None]:
        with hidden(), Computing():
            yield

    monkeypatch.setattr(layers, "_disable_current_modes", out_of_sight)
    place = device()
    with Computing():
        yield place
