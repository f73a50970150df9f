"""The dispatch mode: every operation of a forward pass is looked up in the table of rules, which write the ledger."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DispatchKey  # pyright: ignore[reportAttributeAccessIssue]
from torch.nn.modules import module as module_hooks

from intrafusion.errors import ModelError
from intrafusion.graph import Factor
from intrafusion.network.apart import only_here
from intrafusion.network.decisions import decides
from intrafusion.network.grouped import is_grouped_product, multiply_groups
from intrafusion.network.modes import Mode
from intrafusion.trace.call import Call
from intrafusion.trace.info import Info, LabelledTensor, Outcome
from intrafusion.trace.labels import FIXED, narrow
from intrafusion.trace.ledger import Ledger
from intrafusion.trace.rules import find_rule, refuse
from intrafusion.trace.rules.movement import write_part

_FILLS = tuple(form.format(what) for what in ("zeros", "ones", "full") for form in ("{}", "new_{}", "{}_like"))
_ARITHMETIC = ("mul", "div", "add", "sub", "rsub", "pow", "addmm", "baddbmm", "addcmul", "addcdiv")


class Tracer(Mode):
    """Runs operations as they are, and has the rule of each say in the ledger what it did to the channels."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.modules: list[str] = []  # names of the modules that are running, the innermost last
        self.decides = False  # whether the forward goes by the values of tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_composite(func):
            with self:
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        if is_grouped_product(func):
            if args[0].dtype != torch.float64:
                func(*args, **kwargs)  # it does not take every width
            with self:
                return multiply_groups(*args, **kwargs)
        self.decides = self.decides or decides(func, args)
        seen = self._keep_written(func, args)
        out = self.execute(func, args, kwargs)
        call = Call(func, seen, kwargs, out, self.modules[-1] if self.modules else "")
        if any(map(self.ledger.knows, call.tensors)):
            self.follow(call)
        if call.name in _FILLS or not any(map(self.ledger.knows, call.tensors)):
            self._note_constants(call)
        return out

    def _keep_written(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments as a rule is to see them: a constant that channels are written into as it was before.

        A sum that begins as zeros, `total += branch(x)`, is such; what it holds behind that varies with the channels.
        """
        if not func._schema.is_mutable or not args or not isinstance(args[0], Tensor):
            return args
        if not any(isinstance(x, Tensor) and self.ledger.knows(x) for x in args[1:]):
            return args
        if not self.ledger.is_constant(args[0]):
            return args
        return args[0].detach().clone(), *args[1:]

    def _note_constants(self, call: Call) -> None:
        """Of tensors of which nothing is known: which hold one number everywhere."""
        for tensor in call.tensors if call.in_place else ():
            self.ledger.note_filled(tensor, False)
        if call.name in _FILLS:
            self.ledger.note_filled(call.out, True)

    def execute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute what an operation gives."""
        return func(*args, **kwargs)

    def follow(self, call: Call) -> None:
        """Apply the rule of an operation and keep what it says of the outputs."""
        _check_rectangular(call)
        self.ledger.relations.where = call.where
        for tensor in call.tensors:
            self.ledger.note_read(self.ledger.look_up(tensor), call.where)
        outcome = self._apply_rule(call)
        self._note_factors(call)
        results = outcome if isinstance(outcome, Sequence) else [outcome]
        operands = [self.ledger.look_up(x) for x in call.tensors]
        self.ledger.note_passage(operands, results if len(results) > 1 else [])
        for output, info in zip(call.outputs, results, strict=len(results) > 1):
            if isinstance(output, Tensor):
                if call.in_place and output._is_view():
                    info = write_part(self.ledger, call, output, info)
                elif call.in_place and isinstance(info, LabelledTensor) and self.ledger.is_constant(output):
                    self.ledger.share_with_views(output)
                self.ledger.learn(output, info)

    def _apply_rule(self, call: Call) -> Outcome:
        try:
            return find_rule(call)(self.ledger, call)
        except Exception as error:  # a rule that cannot follow the operation must not pass for understanding it
            return refuse(self.ledger, call, f"not followed ({type(error).__name__})")

    def _note_factors(self, call: Call) -> None:
        """Remember the numbers that channels meet: the forward may derive them from how many channels there are."""
        if call.name not in _ARITHMETIC or not any(_holds_channels(self.ledger.look_up(x)) for x in call.tensors):
            return
        for value in (*call.args, *call.kwargs.values()):
            if isinstance(value, Tensor) and value.numel() == 1 and self.ledger.look_up(value) is None:
                value = value.item()
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self.ledger.relations.factors.append(Factor(call.name, call.where, float(value)))

    @contextlib.contextmanager
    def naming_modules(self, model: nn.Module) -> Iterator[None]:
        """Know the name of the running module, for messages."""
        names = {id(m): n for n, m in model.named_modules()}

        def enter(module: nn.Module, inputs: Any) -> None:
            self.modules.append(names.get(id(module), type(module).__name__))

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self.modules.pop()

        handles = [
            module_hooks.register_module_forward_pre_hook(only_here(enter)),
            module_hooks.register_module_forward_hook(only_here(leave), always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _check_rectangular(call: Call) -> None:
    """
    Raises:
        ModelError: it gives sequences of several lengths in one tensor, along which nothing can be followed.
    """
    if any(isinstance(output, Tensor) and output.is_nested for output in call.outputs):
        raise ModelError(
            f"{call.where} gives a nested tensor, which cannot be followed: expected tensors of one shape. Have the "
            "forward take padded sequences and a mask, or packed ones (torch.nn.utils.rnn.pack_padded_sequence)."
        )


def _holds_channels(info: Info | None) -> bool:
    """Whether a tensor holds anything beside fixed data; one channel alone has no name."""
    return isinstance(info, LabelledTensor) and bool((narrow(info.labels) != FIXED).any())


@functools.cache
def is_composite(func: Any) -> bool:
    """Whether an operation is made of others; such arrive whole where tensors were made in inference mode."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), DispatchKey.CompositeImplicitAutograd)
