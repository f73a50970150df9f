"""Leaves a network as it was found: modes, parameters, buffers, attributes that a forward stores, random numbers."""

from __future__ import annotations

import contextlib
import functools
import operator
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from intrafusion.network.apart import one_at_a_time
from intrafusion.network.tensors import check_initialised, has_content

_SEED = 0
"""Random numbers inside start here, so that two networks that draw them alike can be compared."""

PutBack = Callable[[], object]


@contextlib.contextmanager
def preserve_state(model: nn.Module, memory: Memory | None = None) -> Iterator[Memory]:
    """Evaluation mode inside; everything that a forward may change is put back afterwards, also on errors.

    That is training flags, parameters, buffers, whatever modules keep in attributes (a hidden state, a queue, a cache,
    a counter, at any depth of lists, dicts and plain objects), and the random state of PyTorch, NumPy and Python.
    Random numbers inside do not depend on the state outside. Other threads wait until this one is out again.

    Args:
        memory: of the network as it is now, where one is at hand, as between several passes through the same.
    Raises:
        ModelError: it has no parameters yet; what a first call makes of it could not be undone.
    """
    if memory is None:
        check_initialised(model)
    with one_at_a_time():
        put_back = Memory(model) if memory is None else memory
        with evaluate_alone(model):
            try:
                yield put_back
            finally:
                put_back()


@contextlib.contextmanager
def evaluate_alone(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and random numbers of its own inside; for a copy to throw away: what is changed stays."""
    with one_at_a_time(), _own_random_numbers(model), torch.no_grad(), _nothing_compiled():
        for module in model.modules():
            if module.training:
                module.training = False
        yield


class Memory:
    """What a network holds; calling it puts everything back in its place."""

    def __init__(self, model: nn.Module) -> None:
        # Pairs of what is held and what it held: a function for each would keep the garbage collector busy.
        self.attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []  # of modules
        self.dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []  # of others, and what lies in attributes
        self.empty: list[dict[Any, Any]] = []  # most of what modules hold: a dozen each, for hooks
        self.mappings: list[tuple[MutableMapping[Any, Any], dict[Any, Any]]] = []
        self.tensors: list[tuple[Tensor, Tensor, Tensor | None, bool]] = []  # values, gradient, whether it has any
        self.steps: list[PutBack] = []
        self.changed: list[Callable[[], bool]] = []  # of lists
        self.kept: list[Any] = []  # alive, so that no id is given twice
        modules = list(model.modules())
        self.seen: set[int] = {id(m) for m in modules}
        for module in modules:
            self._remember_dict(module.__dict__, self.attributes)

    def __call__(self) -> None:
        with torch.inference_mode(False):
            for found, before in (*self.attributes, *self.dicts):
                if not _same_items(found, before):
                    found.clear()
                    found.update(before)
            for tensor in self.tensors:
                _put_tensor_back_(*tensor)
            for mapping, before in self.mappings:
                _put_mapping_back_(mapping, before)
            for step in self.steps:
                step()
            for mapping in filter(has_content, self.empty):
                _empty_(mapping)

    @contextlib.contextmanager
    def holding(self, tensors: Collection[Tensor]) -> Iterator[None]:
        """Inside, these hold what they were given since; all else is as it was."""
        before, given = self.tensors, {id(tensor) for tensor in tensors}
        self.tensors = [(t, t.detach().clone() if id(t) in given else v, g, flag) for t, v, g, flag in before]
        try:
            yield
        finally:
            self.tensors = before

    @property
    def rebound(self) -> bool:
        """Whether modules now hold other objects, in attributes or deeper, as where a state is kept between calls."""
        return (
            any(map(len, self.empty))
            or any(changed() for changed in self.changed)
            or any(not _same_items(now, then) for now, then in self.dicts)
            or any(not _same_items(dict(now.items()), then) for now, then in self.mappings)
            or any(not _same_items(_without_mode(now), _without_mode(then)) for now, then in self.attributes)
        )

    def _remember(self, value: Any) -> None:
        self.seen.add(id(value))
        self.kept.append(value)
        if type(value) is dict:
            self._remember_dict(value, self.dicts)
        elif isinstance(value, Tensor):
            self._remember_tensor(value)
        elif isinstance(value, MutableMapping):
            self._remember_mapping(value)
        elif isinstance(value, (list, deque, bytearray)):
            self._remember_sequence(value)
        elif isinstance(value, set):
            self._remember_set(value)
        elif isinstance(value, (tuple, frozenset)):
            self._each(value)
        elif isinstance(value, np.ndarray):
            self._remember_array(value)
        else:
            self._remember_object(value)

    def _each(self, values: Any) -> None:
        for value in values:
            kind = type(value)
            if kind in _DICTS and not has_content(value):
                self.empty.append(value)
            elif kind not in _ATOMS and id(value) not in self.seen:
                self._remember(value)

    def _remember_tensor(self, tensor: Tensor) -> None:
        if type(tensor) is nn.UninitializedParameter or type(tensor) is nn.UninitializedBuffer or tensor.is_meta:
            return
        grad = tensor.grad if tensor.is_leaf else None
        self.tensors.append((tensor, tensor.detach().clone(), grad, tensor.requires_grad))

    def _remember_dict(self, found: dict[Any, Any], kind: list[tuple[dict[Any, Any], dict[Any, Any]]]) -> None:
        """A dict, or the attributes of a module or a plain object, by reference and by what lies in them."""
        before = dict(found)
        kind.append((found, before))
        self.seen.add(id(found))
        self._each(before.values())

    def _remember_mapping(self, found: MutableMapping[Any, Any]) -> None:
        try:
            before = dict(found.items())
        except Exception:  # a mapping that computes its items
            return
        self.mappings.append((found, before))
        self._each(before.values())
        self._remember_object(found)

    def _remember_sequence(self, found: Any) -> None:
        before = list(found)
        changed = lambda: len(found) != len(before) or any(a is not b for a, b in zip(found, before, strict=True))  # noqa: E731
        self.changed.append(changed)

        def put_back() -> None:
            if changed():
                found.clear()
                found.extend(before)

        self.steps.append(put_back)
        if not isinstance(found, bytearray):
            self._each(before)
        self._remember_object(found)

    def _remember_set(self, found: set[Any]) -> None:
        before = set(found)

        def put_back() -> None:
            if found != before:
                found.clear()
                found.update(before)

        self.steps.append(put_back)

    def _remember_array(self, found: np.ndarray) -> None:
        before = found.copy()

        def put_back() -> None:
            if found.flags.writeable:
                found[...] = before

        self.steps.append(put_back)

    def _remember_object(self, value: Any) -> None:
        if isinstance(value, torch.Generator):
            state = value.get_state()
            self.steps.append(functools.partial(value.set_state, state))
        elif isinstance(value, np.random.Generator):
            drawn = value.bit_generator.state
            self.steps.append(functools.partial(setattr, value.bit_generator, "state", drawn))
        elif isinstance(value, random.Random):
            self.steps.append(functools.partial(value.setstate, value.getstate()))
        elif type(own := getattr(value, "__dict__", None)) is dict and not isinstance(value, _WITHOUT_STATE):
            self._remember_dict(own, self.dicts)


def _without_mode(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name != "training"}


def _put_tensor_back_(tensor: Tensor, value: Tensor, grad: Tensor | None, flag: bool) -> None:
    if not _same_bits(tensor, value):
        _put_back_(tensor, value)
    if tensor.is_leaf and tensor.requires_grad != flag:
        tensor.requires_grad_(flag)
    if tensor.is_leaf and tensor.grad is not grad:
        tensor.grad = grad


def _put_mapping_back_(found: MutableMapping[Any, Any], before: dict[Any, Any]) -> None:
    if not _same_items(dict(found.items()), before):
        found.clear()
        for key, value in before.items():
            found[key] = value


def _empty_(mapping: dict[Any, Any]) -> None:
    mapping.clear()
    if type(mapping) is not dict:
        vars(mapping).clear()


_ATOMS = frozenset([int, float, complex, bool, str, bytes, type(None), torch.Size, torch.dtype, torch.device])
_DICTS = frozenset([dict, OrderedDict])
_WITHOUT_STATE = (
    *(type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType),
    *(torch.optim.Optimizer, torch.utils.data.Dataset, torch.utils.data.DataLoader),  # large, and no forward's own
)


def _same_items(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    return len(a) == len(b) and list(a) == list(b) and all(map(operator.is_, a.values(), b.values()))


@contextlib.contextmanager
def _own_random_numbers(model: nn.Module) -> Iterator[None]:
    """Inside, random numbers start from a fixed seed; outside, nobody notices."""
    put_back = remember_random_numbers(model)
    try:
        torch.default_generator.manual_seed(_SEED)
        for device in _list_devices(model):
            torch.cuda.default_generators[device].manual_seed(_SEED)
        random.seed(_SEED)
        np.random.seed(_SEED)  # noqa: NPY002
        yield
    finally:
        put_back()


def remember_random_numbers(model: nn.Module) -> PutBack:
    """The random state of PyTorch, also where the network lies, of NumPy and of Python; a call puts it back."""
    devices, plain, arrays = _list_devices(model), random.getstate(), np.random.get_state()  # noqa: NPY002
    state, others = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]

    def put_back() -> None:
        torch.set_rng_state(state)
        for device, other in zip(devices, others, strict=True):
            torch.cuda.set_rng_state(other, device)
        random.setstate(plain)
        np.random.set_state(arrays)  # noqa: NPY002

    return put_back


def _list_devices(model: nn.Module) -> list[int]:
    if not torch.cuda.is_initialized():
        return []
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def _nothing_compiled() -> contextlib.AbstractContextManager[object]:
    """What `torch.compile` made runs eagerly inside, so that modes see it and no new shape is compiled."""
    if "torch._dynamo" not in sys.modules:  # then nothing was compiled, and importing it takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _put_back_(tensor: Tensor, value: Tensor) -> None:
    """In the same memory where it still has the shape."""
    if tensor.shape == value.shape and tensor.dtype == value.dtype:
        tensor.data.copy_(value)
    else:
        tensor.data = value.clone()  # what is remembered may be put back again


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != torch.strided:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
