"""Runs a network once under a dispatch mode that carries channel labels beside every tensor."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C import DispatchKey  # pyright: ignore[reportAttributeAccessIssue]
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph, Role, Slice
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.state import preserve_state
from intrafusion.trace.groups import build_graph
from intrafusion.trace.info import Activation, Info, Origin, Plane, Weight
from intrafusion.trace.labels import FIXED, UNIFORM, along, filled, narrowed, occurrences, pairs, spread, varying
from intrafusion.trace.relations import Relations
from intrafusion.trace.rules import refuse, rule_for


@functools.cache
def argument_names(func: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Argument names of an aten overload, and its defaults."""
    arguments = func._schema.arguments
    return tuple(a.name for a in arguments), {a.name: a.default_value for a in arguments}


@functools.cache
def operation_name(func: Any) -> str:
    """'add' for aten::add, aten::add_ and every overload."""
    name = func._schema.name.partition("::")[2]
    return name if name.startswith("__") else name.rstrip("_")


@functools.cache
def is_composite(func: Any) -> bool:
    """Whether an operation is made of others; such arrive whole where tensors were made in inference mode."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), DispatchKey.CompositeImplicitAutograd)


class Call:
    """One dispatched operation with its arguments by name."""

    __slots__ = ("args", "func", "kwargs", "module", "name", "out")

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, module: str) -> None:
        self.func, self.args, self.kwargs, self.out, self.module = func, args, kwargs, out, module
        self.name = operation_name(func)

    def __getitem__(self, name: str) -> Any:
        names, defaults = argument_names(self.func)
        if name in self.kwargs:
            return self.kwargs[name]
        index = names.index(name) if name in names else len(self.args)
        return self.args[index] if index < len(self.args) else defaults.get(name)

    @property
    def tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, (list, tuple)):
                found.extend(item for item in value if isinstance(item, Tensor))
        return found

    @property
    def outputs(self) -> list[Any]:
        return list(self.out) if isinstance(self.out, (list, tuple)) else [self.out]

    @property
    def in_place(self) -> bool:
        return self.func._schema.is_mutable

    @property
    def where(self) -> str:
        return f"{self.name} in {self.module or 'the network'}"


class Tracer(TorchDispatchMode):
    """Holds what is known about each live tensor; the rules in `rules/` say what operations do to it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.relations = Relations()
        self.known = WeakTensorKeyDictionary()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.reached: set[str] = set()
        self.origins: list[Origin] = []
        self.modules: list[str] = []
        self.names: dict[int, str] = {}
        self.parameters: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and id(tensor) not in self.parameters:
                self.parameters[id(tensor)] = name
                self.shapes[name] = tuple(tensor.shape)

    # ---- what is known about tensors --------------------------------------------------------------------------------

    def info(self, tensor: Tensor | None) -> Info | None:
        """What is known of a tensor; parameters and buffers get their coordinates when they are first read."""
        if tensor is None:
            return None
        known = self.known.get(tensor)
        if known is None and id(tensor) in self.parameters:
            known = self.known[tensor] = self._coordinates(self.parameters[id(tensor)])
        return known

    def _coordinates(self, name: str) -> Weight:
        self.reached.add(name)
        shape = self.shapes[name]
        return Weight([Plane(name, d, along(np.arange(size), d, shape)) for d, size in enumerate(shape)])

    def fixed(self, shape: torch.Size) -> Activation:
        return Activation(filled(FIXED, shape))

    def settled(self, labels: Tensor) -> Tensor:
        """The same channels with one label along dimensions that turned out to carry none."""
        united = spread(self.relations.roots(narrowed(labels)), labels.shape)
        same = varying(labels) - varying(united)
        first = labels[tuple(slice(0, 1) if d in same else slice(None) for d in range(labels.dim()))]
        return first.expand(labels.shape)

    def told_apart(self, labels: Tensor, dims: set[int]) -> Tensor:
        """A channel that stands at several places along these dimensions gets a label for each."""
        for dim in dims & varying(labels):
            rank = occurrences(narrowed(labels), dim)
            if rank.any():
                labels = spread(self.relations.copy(narrowed(labels), rank), labels.shape)
        return labels

    def uniform(self, shape: tuple[int, ...]) -> Activation:
        return Activation(filled(UNIFORM, shape))

    def compute(self, call: Call) -> None:
        """Find the rule for an operation and note what it says of the outputs."""
        for tensor in call.tensors:
            self.read(self.info(tensor), call.where)
        try:
            result = rule_for(call)(self, call)
        except Exception as error:  # a rule that cannot follow the operation must not pass for understanding it
            result = refuse(self, call, f"not followed ({type(error).__name__})")
        results = result if isinstance(result, Sequence) else [result]
        outputs = call.outputs
        self.set_apart([self.info(x) for x in call.tensors], results if len(results) > 1 else [])
        for output, info in zip(outputs, results, strict=len(results) > 1):
            if not isinstance(output, Tensor):
                continue
            if info is not None:
                self.known[output] = info
            elif output in self.known:
                del self.known[output]

    def read(self, info: Info | None, where: str) -> None:
        """Note that something reads a tensor."""
        if isinstance(info, Activation):
            if info.origin is not None:
                info.origin.reads += 1
            if info.indices_of is not None:
                self.relations.forbid(info.indices_of, f"the position of a channel is read: {where}")

    def set_apart(self, operands: Sequence[Info | None], results: Sequence[Info | None]) -> None:
        """Channels that pass an operation are unlike those that do not, operand by operand, output by output."""
        self.relations.calls += 1
        for slot, info in enumerate((*operands, *results)):
            if isinstance(info, Activation):
                self.relations.passed(narrowed(info.labels), slot)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_composite(func):
            with self:
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        out = func(*args, **kwargs)
        call = Call(func, args, kwargs, out, self.modules[-1] if self.modules else "")
        if any(t in self.known or id(t) in self.parameters for t in call.tensors):
            self.compute(call)
        return out

    # ---- relations between channels and tensors ---------------------------------------------------------------------

    def record(
        self,
        weight: Weight,
        plane: Plane,
        role: Role,
        labels: Tensor,
        *,
        low: int = FIXED,
        within: Slice | None = None,
        part: slice = slice(None),
    ) -> None:
        """A linear map's weight produces or consumes the labels along one of its dimensions."""
        coordinates = plane.coordinates[part] if part != slice(None) else plane.coordinates
        positions, channels = pairs(coordinates, labels.expand(coordinates.shape), 0, low)
        key = (plane.tensor, plane.dim, within)
        self.relations.use(key, self.shapes[plane.tensor][plane.dim], role, positions, channels)
        if weight.nonlinear:
            self.relations.reparametrised.setdefault(plane.tensor, weight.nonlinear)

    def follow(self, weight: Weight, labels: Tensor, role: Role) -> Tensor:
        """A per-channel tensor meets labels of its shape; returns the labels of the result."""
        for plane in weight.planes:
            if not plane.varies:
                continue
            if plane.varies & varying(labels):
                labels = self.told_apart(labels, plane.varies)
                positions, channels = pairs(plane.coordinates, labels, 0, FIXED)
                self.relations.follow(plane.tensor, plane.dim, role, positions, channels)
            else:
                self.relations.pin(plane.tensor, plane.dim, "laid along a dimension that is no channel dimension")
            if bool((narrowed(labels) == UNIFORM).any()):
                labels = torch.where((labels == UNIFORM) & (plane.coordinates >= 0), FIXED, labels)
        return labels

    def pin(self, info: Info | None, reason: str, dims: set[int] | None = None) -> None:
        """Forbid channels along the dimensions of a weight that vary (along `dims`, if given)."""
        if isinstance(info, Weight):
            for plane in info.planes:
                if dims is None or plane.varies & dims:
                    self.relations.pin(plane.tensor, plane.dim, reason)

    def forbid(self, info: Info | None, reason: str) -> None:
        """Block whatever a tensor carries."""
        if isinstance(info, Activation):
            self.relations.forbid(narrowed(info.labels).ravel(), reason)
        self.pin(info, reason)

    def activate(self, info: Info, dims: set[int]) -> Activation:
        """Use a weight-like tensor (class token, embedding row) as an activation with channels along dims."""
        if isinstance(info, Activation):
            return info
        planes = [p for p in info.planes if p.varies and p.varies <= dims]
        if not planes:
            shape = info.planes[0].coordinates.shape if info.planes else torch.Size()
            return self.fixed(shape)
        first = planes[0]
        fresh = torch.from_numpy(self.relations.fresh(self.shapes[first.tensor][first.dim]))
        coordinates = first.coordinates
        small = torch.from_numpy(np.ascontiguousarray(narrowed(coordinates)))
        labels = torch.where(small < 0, UNIFORM, fresh[small.clamp(min=0)]).expand(coordinates.shape)
        for plane in planes:
            self.record(info, plane, Role.PRODUCES, labels)
        return Activation(labels)


@contextlib.contextmanager
def module_names(tracer: Tracer, model: nn.Module) -> Iterator[None]:
    """Keep the name of the running module on the tracer's stack."""
    names = {id(m): n for n, m in model.named_modules()}

    def enter(module: nn.Module, inputs: Any) -> None:
        tracer.modules.append(names.get(id(module), type(module).__name__))

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        tracer.modules.pop()

    handles = [
        module_hooks.register_module_forward_pre_hook(enter),
        module_hooks.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def no_fused_recurrence(active: bool) -> Iterator[None]:
    """Recurrent layers step by step instead of in one kernel."""
    if not active:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the flags' own getters warn on builds without the other backend
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
            yield


@contextlib.contextmanager
def decomposed(model: nn.Module) -> Iterator[None]:
    """Attention in its mathematical form and recurrent networks without fused kernels, so that every step is seen."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    fused = any(isinstance(m, nn.RNNBase) for m in model.modules())
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            no_fused_recurrence(fused),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def run(model: nn.Module, inputs: Inputs) -> Tracer:
    """One traced forward pass; output channels are forbidden."""
    tracer = Tracer(model)
    for given in inputs.tensors():
        tracer.known[given] = tracer.fixed(given.shape)
    with preserve_state(model), torch.no_grad(), decomposed(model), module_names(tracer, model):
        with tracer:
            outputs = inputs.call(model)
        for output in outputs:
            info = tracer.info(output)
            tracer.read(info, "output of the network")
            tracer.forbid(info, "output of the network")
    return tracer


def trace(model: nn.Module, example_inputs: ExampleInputs) -> ChannelGraph:
    """Find the coupled channel groups of a network from one run on an example input.

    The network may be frozen, in half precision, in training or evaluation mode; it is traced in evaluation mode and
    left exactly as it was found. Data-dependent control flow is followed for the example input only.

    Args:
        model: any eager PyTorch module.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; a batch of one will do.
    Returns:
        every group, in execution order; those that cannot be reduced say why.
    Raises:
        ModelError: the network does not run on the example inputs, or has uninitialised (lazy) parameters.
    """
    inputs = Inputs.of(example_inputs)
    lazy = [n for n, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise ModelError(f"parameter {lazy[0]!r} is not initialised yet; run the network once before tracing it.")
    try:
        tracer = run(model, inputs.varied())
    except ModelError:
        tracer = run(model, inputs)
    return build_graph(tracer.relations, tracer.shapes, tracer.origins, unreached(model, tracer))


def unreached(model: nn.Module, tracer: Tracer) -> tuple[str, ...]:
    names = [n for n, _ in model.named_parameters() if n in tracer.shapes and n not in tracer.reached]
    if not names:
        return ()
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return (f"{len(names)} parameters were not used on the example input and are left as they are: {shown}.",)
