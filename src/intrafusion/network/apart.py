"""Keeps what is done here and what other threads of the program do out of each other's way."""

from __future__ import annotations

import contextlib
import contextvars
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, ParamSpec

import torch
from torch import nn

from intrafusion.errors import ModelError
from intrafusion.network.tensors import copy_model

P = ParamSpec("P")

_inside = contextvars.ContextVar("inside", default=False)  # goes on in threads that a pass is handed to
_locks = [threading.Lock()]
_borrowed = weakref.WeakValueDictionary[int, nn.Module]()


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Only one thread is in here, as often as it likes: what is changed inside holds for the whole process.

    Such are random numbers and switches of PyTorch: two threads that put back what they found would put back what the
    other one set.
    """
    if _inside.get():
        yield
        return
    with _locks[0]:
        token = _inside.set(True)
        try:
            yield
        finally:
            _inside.reset(token)


def _forget_lock() -> None:
    """In a new process, no other thread is left to give it back."""
    _locks[0] = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lock)


@contextlib.contextmanager
def forked_random_numbers() -> Iterator[None]:
    """PyTorch's random numbers on the CPU go on afterwards as if nothing had been drawn inside."""
    with one_at_a_time(), torch.random.fork_rng(devices=[]):
        yield


def only_here(hook: Callable[P, None]) -> Callable[P, None]:
    """A hook for all modules that there are, but for calls by this thread only."""
    here = threading.get_ident()

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        if threading.get_ident() == here:
            hook(*args, **kwargs)

    return call


def borrow(model: nn.Module) -> nn.Module:
    """A network with the same weights, in the same memory, whose modules, attributes and buffers are its own.

    Hooks, modes and states that it gets are never met by a thread that calls the given one meanwhile, nor what that one
    does by whoever watches this; and wherever an interrupt falls, the given one is as it was. What is borrowed already
    comes back as it is, and so does a network that cannot be copied, or whose modules functions call that were put into
    it, as these would call the given ones.
    """
    if _borrowed.get(id(model)) is model or _is_called_from_outside(model):
        return model
    aliases = {id(p): _alias(p) for p in model.parameters()}
    try:
        own = copy_model(model, standing_in=aliases)
    except ModelError:
        return model
    _borrowed[id(own)] = own
    return own


def _is_called_from_outside(model: nn.Module) -> bool:
    """Whether a function that is an attribute, such as a forward of one's own, knows modules of this network."""
    own = {id(module) for module in model.modules()}
    functions = [f for m in model.modules() for f in vars(m).values() if isinstance(f, FunctionType)]
    return any(id(value) in own for function in functions for value in _list_known(function))


def _list_known(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # it is empty
            yield cell.cell_contents
    yield from (function.__globals__.get(name) for name in function.__code__.co_names)


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter in the same memory, whose flags and gradient are its own; of a special kind, the same one."""
    if type(parameter) is not nn.Parameter or parameter.is_inference():
        return parameter
    return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until what is done inside is done, which is to be short."""
    before: Any = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came = list[tuple[Any, ...]]()
    signal.signal(signal.SIGINT, lambda *args: came.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(*came[0])
