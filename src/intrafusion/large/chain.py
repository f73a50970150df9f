"""The blocks of a network that run one after another, each on what the one before gives, and how each is called."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError
from intrafusion.names import name_some
from intrafusion.network.inputs import Inputs, told_of
from intrafusion.network.tensors import copy_model

_STREAM = "hidden_states"  # as networks of transformers call what goes from block to block
_ELSE = "compress it whole (in a shell, without --blockwise)"


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the blocks: the one list of modules of one class that lies in no other such list.

    Raises:
        ModelError: there is none, there are several, or blocks share tensors with what lies outside.
    """
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        and len(module) > 1
        and len({type(m) for m in module}) == 1
        and any(True for _ in module.parameters())
    ]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        found = f"got {len(outer)} ({name_some(outer)})" if outer else "got none"
        raise ModelError(f"{type(model).__name__}: expected one list of blocks of one class, {found}; {_ELSE}.")
    blocks = tuple(f"{outer[0]}.{name}" for name, _ in model.get_submodule(outer[0]).named_children())
    _refuse_shared(model, blocks)
    return blocks


def _refuse_shared(model: nn.Module, blocks: tuple[str, ...]) -> None:
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    owners = Counter(id(tensor) for _, tensor in every)
    inside = [
        name for name, tensor in every if owners[id(tensor)] > 1 and name.startswith(tuple(f"{b}." for b in blocks))
    ]
    if inside:
        raise ModelError(
            f"{type(model).__name__}: expected blocks with tensors of their own, got {name_some(inside)}, which stand "
            f"in several places; {_ELSE}."
        )


def load_block(skeleton: nn.Module, name: str, read: Callable[[str], Tensor]) -> nn.Module:
    """A copy of one block with its weights, in float32.

    Args:
        read: a tensor by its name in the network.
    """
    block = copy_model(skeleton.get_submodule(name))
    state = {own: read(f"{name}.{own}") for own in block.state_dict()}
    lifted = {own: t.float() if t.is_floating_point() else t for own, t in state.items()}
    block.load_state_dict(lifted, assign=True)
    return block


@dataclass(frozen=True, eq=False)
class BlockCall:
    """How a block is called, but for the stream.

    Attributes:
        place: of the stream, among the arguments: the first, or the one of this name.
        whole: whether the block gives the stream alone, not first in a tuple.
        network: the call of the network that this is a part of.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    place: str | None
    whole: bool
    network: Inputs

    __repr__ = show_briefly

    def on(self, stream: Tensor) -> Inputs:
        """The call on this stream; rows count as in the network's call."""
        args = self.args if self.place else (stream, *self.args[1:])
        kwargs = {**self.kwargs, self.place: stream} if self.place else self.kwargs
        weights, source = self.network.weights, self.network.source
        return Inputs(args, kwargs, source, weights=weights, outputs=None if self.whole else (0,))


def run_block(block: nn.Module, call: Inputs) -> Tensor:
    """The stream that a block gives."""
    with torch.no_grad():
        return call.call(block)[0]


def follow_blocks(
    skeleton: nn.Module, blocks: tuple[str, ...], call: Inputs, first: nn.Module
) -> tuple[Tensor, list[BlockCall]]:
    """The stream as it reaches the first block, and how every block is called.

    All but what stands before the blocks is not run: in their place each gives back the stream that it got.

    Args:
        first: a copy of the first block with its weights, to see what a block gives.
    Raises:
        ModelError: the network does not run, or its blocks do not run one after another, each once and each on what
            the one before gives.
    """
    walk = _Walk(blocks, call, first)
    given = call.copied()
    with walk.standing_in(skeleton), torch.no_grad(), contextlib.suppress(_LastReached), told_of(skeleton, call):
        skeleton(*given.args, **(given.kwargs or {}))
        raise walk.refuse(f"{len(walk.calls)} of the {len(blocks)} ran")
    assert walk.stream is not None
    return walk.stream, walk.calls


class _LastReached(BaseException):  # no error: what comes behind the blocks is not run
    pass


class _Walk:
    """What stands in for the blocks, and what they were called with."""

    def __init__(self, blocks: tuple[str, ...], call: Inputs, first: nn.Module) -> None:
        self.blocks, self.call, self.first = blocks, call, first
        self.stream: Tensor | None = None
        self.calls: list[BlockCall] = []
        self.rest: tuple[Any, ...] = ()

    @contextlib.contextmanager
    def standing_in(self, model: nn.Module) -> Iterator[None]:
        modules = [model.get_submodule(name) for name in self.blocks]
        before = [vars(module).get("forward") for module in modules]
        for index, module in enumerate(modules):
            vars(module)["forward"] = lambda *args, _index=index, **kwargs: self.pass_on(_index, args, kwargs)
        try:
            yield
        finally:
            for module, own in zip(modules, before, strict=True):
                vars(module).pop("forward")
                vars(module).update({} if own is None else {"forward": own})

    def pass_on(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = None if args else _STREAM
        stream = args[0] if args else kwargs.get(_STREAM)
        if index != len(self.calls):
            raise self.refuse(f"{self.blocks[index]} ran as number {len(self.calls) + 1}")
        if self.stream is None:
            self.look_at_first(stream, args, kwargs)
        elif stream is not self.stream:
            raise self.refuse(f"{self.blocks[index]} reads something else")
        self.calls.append(BlockCall(args, kwargs, place, self.whole, self.call))
        if len(self.calls) == len(self.blocks):
            raise _LastReached
        return self.stream if self.whole else (self.stream, *self.rest)

    def look_at_first(self, stream: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = self.first(*args, **kwargs)
        self.whole = isinstance(found, Tensor)
        given = found if self.whole else found[0] if isinstance(found, tuple) and found else None
        if not isinstance(stream, Tensor) or not isinstance(given, Tensor) or given.shape != stream.shape:
            raise self.refuse(f"{self.blocks[0]} does not read and give one tensor of one shape first")
        self.stream, self.rest = stream, () if self.whole else found[1:]

    def refuse(self, why: str) -> ModelError:
        return ModelError(
            f"expected blocks that run one after another, each once and on what the one before gives: {why}; {_ELSE}."
        )
