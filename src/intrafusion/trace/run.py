"""A network and an example input -> its ChannelGraph: one traced forward pass, then the grouping."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from intrafusion.arguments import checked
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph
from intrafusion.network.apart import borrow
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.state import Memory, preserve_state
from intrafusion.network.wrappers import outside_inference, unwrap
from intrafusion.trace.decomposition import decompose
from intrafusion.trace.dispatch import Tracer
from intrafusion.trace.fixed import find_fixed_sides
from intrafusion.trace.groups import build_graph
from intrafusion.trace.info import LabelledTensor
from intrafusion.trace.ledger import Ledger
from intrafusion.trace.random import Draws


@checked
@outside_inference
def trace(model: nn.Module, example_inputs: ExampleInputs, *, calls: int | None = None) -> ChannelGraph:
    """Find the coupled channel groups of a network from one run on an example input.

    The network may be frozen, in half precision, in training or evaluation mode; it is traced in evaluation mode and
    left exactly as it was found. Data-dependent control flow is followed for the example input only.

    Args:
        model: any eager PyTorch module.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; a batch of one will do.
        calls: how many in a row; by default two where the first leaves a state in an attribute, else one.
    Returns:
        every group, in execution order; those that cannot be reduced say why.
    Raises:
        ModelError: the network does not run on the example inputs, or has uninitialised (lazy) parameters.
    """
    model, inputs = borrow(unwrap(model)), Inputs.of(example_inputs)
    run = _run_first_possible(model, inputs, calls)
    warnings = (*_warn_of_unreached(model, run.ledger), *_warn_of_unopened(run), *_warn_of_draws(run))
    graph = build_graph(run.ledger.relations, run.ledger.shapes, run.ledger.origins, warnings)
    return replace(graph, calls=run.calls, fixed=find_fixed_sides(run.ledger, graph))


@contextlib.contextmanager
def follow_run(tracer: Tracer, model: nn.Module, inputs: Inputs) -> Iterator[Memory]:
    """Where a forward pass under this tracer shows every step; the network is left as it was found."""
    for given in inputs.tensors():
        tracer.ledger.learn(given, LabelledTensor.fixed(given.shape))
    with preserve_state(model) as memory, torch.no_grad(), decompose(model), tracer.naming_modules(model):
        yield memory


@dataclass(eq=False)
class _Run:
    """What one traced run found.

    Attributes:
        calls: forward calls in a row that were followed.
        draws: operations that draw random numbers.
        closed: kinds of objects in the output that could not be looked into.
    """

    ledger: Ledger
    calls: int = 1
    draws: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)


def _run_first_possible(model: nn.Module, inputs: Inputs, calls: int | None) -> _Run:
    """On inputs with no two values alike, or as they are; called once where a second call in a row is not taken."""
    attempts = [(inputs.varied(), calls), (inputs, calls), *([(inputs, 1)] if calls is None else [])]
    for given, count in attempts[:-1]:
        try:
            return _run(model, given, count)
        except ModelError:  # not every network takes other values (an index, a mask), or two calls in a row
            continue
    return _run(model, *attempts[-1])


def _run(model: nn.Module, inputs: Inputs, calls: int | None) -> _Run:
    """One traced forward pass, two where the network keeps something from call to call; outputs may not move."""
    run = _Run(Ledger(model))
    tracer = Tracer(run.ledger)
    with follow_run(tracer, model, inputs) as memory:
        with tracer, Draws(mean=True) as draws:
            opened = inputs.opened(model)
            outputs = [
                *opened.tensors,
                *_call_again(run, model, inputs, memory.rebound if calls is None else calls > 1),
            ]
        run.closed, run.draws = opened.closed, draws.names
        names = {id(t): name for name, tensors in reversed(opened.entries) for t in tensors}
        for output in outputs:
            _fix_output(run.ledger, output, names.get(id(output)))
    return run


def _call_again(run: _Run, model: nn.Module, inputs: Inputs, wanted: bool) -> list[Tensor]:
    """What the network gives on the state that the first call left; noted in the run."""
    if not wanted:
        return []
    outputs = inputs.call(model)
    run.calls = 2
    return outputs


def _fix_output(ledger: Ledger, output: Tensor, name: str | None) -> None:
    info, reason = ledger.look_up(output), "output of the network" + (f" ({name})" if name else "")
    ledger.note_read(info, reason)
    ledger.forbid(info, reason)


def _warn_of_unreached(model: nn.Module, ledger: Ledger) -> tuple[str, ...]:
    names = [n for n, _ in model.named_parameters() if n in ledger.shapes and n not in ledger.reached]
    if not names:
        return ()
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return (f"{len(names)} parameters were not used on the example input and are left as they are: {shown}.",)


def _warn_of_unopened(run: _Run) -> tuple[str, ...]:
    if not run.closed:
        return ()
    kinds = ", ".join(run.closed)
    return (f"the output holds {kinds}, which cannot be looked into: tensors in there were not taken for outputs.",)


def _warn_of_draws(run: _Run) -> tuple[str, ...]:
    if not run.draws:
        return ()
    return (
        f"the forward draws random numbers in evaluation mode too ({', '.join(run.draws)}); it was traced and proved "
        "with their mean where they have the shape of a tensor, else from one seed.",
    )
