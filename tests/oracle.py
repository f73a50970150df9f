"""An independent judge of channel groups: permutes, spoils and duplicates channels of the network itself, in float64.

Knows only the data classes of `intrafusion.graph`; shares no code with the tracer or with the surgery.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from intrafusion.graph import ChannelGroup, Member, Role

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]
CARRIES = frozenset(Role) - {Role.CONSUMES}
LOW = (torch.float32, torch.float16, torch.bfloat16)


# ---- running a network in double precision --------------------------------------------------------------------------


class AllDouble(TorchDispatchMode):
    """Whatever a network casts to a shorter float inside stays in float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in LOW:
            kwargs["dtype"] = torch.float64
        args = tuple(torch.float64 if isinstance(a, torch.dtype) and a in LOW else a for a in args)
        out = func(*args, **kwargs)
        return out if func._schema.is_mutable else tree_map(lengthened, out)


def lengthened(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.double() if value.dtype in LOW else value.to(torch.complex128) if value.is_complex() else value


def double_copy(model: nn.Module) -> nn.Module:
    """`double` leaves complex parameters as they are."""
    model = copy.deepcopy(model).double()
    for parameter in model.parameters():
        parameter.data = lengthened(parameter.data)
    return model


def double(inputs: Any) -> Any:
    """Floating tensors of nested inputs in float64."""
    return tree_map(lengthened, inputs)


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Every tensor that the network returns, in float64."""
    with AllDouble():
        if isinstance(inputs, dict):
            out = model(**{k: cloned(v) for k, v in inputs.items()})
        else:
            out = model(*(cloned(v) for v in (inputs if isinstance(inputs, tuple) else (inputs,))))
    leaves = tree_leaves(out.to_tuple() if hasattr(out, "to_tuple") else out)
    return [t.clone().double() for t in leaves if isinstance(t, Tensor)]


def cloned(value: Any) -> Any:
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value)


def relative_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Largest deviation of any output, relative to that output's largest entry; NaN where either is NaN."""
    assert [x.shape for x in a] == [y.shape for y in b]
    errors = [(x - y).abs().max() / y.abs().max().clamp(min=1e-12) for x, y in zip(a, b, strict=True) if y.numel()]
    return float(torch.stack(errors).max())


@torch.no_grad()
def randomise_(model: nn.Module, seed: int = 1, gain: float = 1.5) -> nn.Module:
    """Weights large enough that the output reacts to each of them; gains, biases and statistics all different."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.dim() >= 2:
            fan_in = max(parameter.numel() // parameter.shape[0], 1)
            parameter.copy_(noise(parameter) * gain / fan_in**0.5)
        else:
            start = 1.0 if name.endswith("weight") else 0.0
            parameter.copy_(start + 0.3 * noise(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(0.5 + noise(buffer).abs())
        elif name.endswith("running_mean"):
            buffer.copy_(0.3 * noise(buffer))
    return model


# ---- moving channels ------------------------------------------------------------------------------------------------


def view_of(model: nn.Module, member: Member) -> Tensor:
    """The tensor of a member (the part it holds within), sharing memory with the network."""
    tensor = dict(tensors_of(model))[member.tensor].detach()
    part = member.within
    return tensor if part is None else tensor.narrow(part.dim, part.start, part.stop - part.start)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def permute_(model: nn.Module, members: Iterable[Member], order: Tensor) -> None:
    """Channel c of each member becomes what channel order[c] was."""
    for member in members:
        tensor, positions = view_of(model, member), torch.as_tensor(member.positions)
        moved = tensor.index_select(member.dim, positions[order].reshape(-1))
        tensor.index_copy_(member.dim, positions.reshape(-1), moved)


@contextlib.contextmanager
def permuted(model: nn.Module, members: Sequence[Member], order: Tensor) -> Iterator[None]:
    """Permuted inside the block, put back exactly after it."""
    permute_(model, members, order)
    try:
        yield
    finally:
        permute_(model, members, torch.argsort(order))


def derangement(size: int, generator: torch.Generator | None = None) -> Tensor:
    """A random cyclic order: no channel stays where it was."""
    cycle = torch.randperm(size, generator=generator)
    order = torch.empty(size, dtype=torch.long)
    order[cycle] = cycle.roll(1)
    return order


def permutation_error(model: nn.Module, inputs: Inputs, groups: Iterable[ChannelGroup], seed: int = 0) -> float:
    """Relative change of the outputs when the channels of all these groups are permuted at once (float64 model)."""
    before, generator = outputs_of(model, inputs), torch.Generator().manual_seed(seed)
    with contextlib.ExitStack() as stack:
        for group in groups:
            stack.enter_context(permuted(model, group.members, derangement(group.size, generator)))
        return relative_difference(outputs_of(model, inputs), before)


# ---- negative control -----------------------------------------------------------------------------------------------


def control(model: nn.Module, inputs: Inputs, group: ChannelGroup, left_out: Member) -> float:
    """Relative change of the outputs when one member is left unpermuted; must not be small."""
    rest = [m for m in group.members if m is not left_out]
    before = outputs_of(model, inputs)
    with permuted(model, rest, derangement(group.size, torch.Generator().manual_seed(0))):
        return relative_difference(outputs_of(model, inputs), before)


def influence(model: nn.Module, inputs: Inputs, member: Member) -> float:
    """Relative change of the outputs when the member's own entries are shuffled, alone.

    Zero for a member that cannot matter, such as the bias of keys under a softmax over keys.
    """
    before, tensor = outputs_of(model, inputs), view_of(model, member)
    with permuted(model, [member], derangement(len(member.positions), torch.Generator().manual_seed(0))):
        shuffled = relative_difference(outputs_of(model, inputs), before)
    saved, index = tensor.clone(), torch.as_tensor(member.positions).reshape(-1)
    tensor.index_copy_(member.dim, index, tensor.index_select(member.dim, index) * 1.5)
    scaled = relative_difference(outputs_of(model, inputs), before)
    tensor.copy_(saved)
    return max(shuffled, scaled)


# ---- duplicates -----------------------------------------------------------------------------------------------------


def duplicate_errors(
    model: nn.Module, inputs: Inputs, group: ChannelGroup, i: int = 0, j: int = 1
) -> tuple[float, float]:
    """What merging costs when channel j is an exact copy of channel i.

    First: the change of the outputs when the consumers of i receive the sum and those of j receive zero. Second: the
    further change when channel j then carries something else. Both are zero where channels are consumed linearly and
    nothing else looks at them; a group whose second is not zero reads its channels elsewhere (a softmax, a norm).
    """
    model = copy.deepcopy(model)
    carriers = [m for m in group.members if Role.CONSUMES not in m.roles]
    for member in carriers:
        copy_channel_(view_of(model, member), member, i, j)
    copied = outputs_of(model, inputs)
    for member in group.with_role(Role.CONSUMES):
        merge_channels_(view_of(model, member), member, i, j)
    merged = outputs_of(model, inputs)
    for member in carriers:
        if member.roles & {Role.PRODUCES, Role.SHIFTS}:
            disturb_channel_(view_of(model, member), member, j)
    return relative_difference(merged, copied), relative_difference(outputs_of(model, inputs), copied)


def at(member: Member, channel: int) -> Tensor:
    return torch.as_tensor(member.positions[channel])


def copy_channel_(tensor: Tensor, member: Member, i: int, j: int) -> None:
    tensor.index_copy_(member.dim, at(member, j), tensor.index_select(member.dim, at(member, i)))


def merge_channels_(tensor: Tensor, member: Member, i: int, j: int) -> None:
    tensor.index_add_(member.dim, at(member, i), tensor.index_select(member.dim, at(member, j)))
    tensor.index_fill_(member.dim, at(member, j), 0.0)


def disturb_channel_(tensor: Tensor, member: Member, j: int) -> None:
    tensor.index_copy_(member.dim, at(member, j), tensor.index_select(member.dim, at(member, j)) * -0.7 + 0.1)
