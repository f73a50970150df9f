"""A network and an example input -> its ChannelGraph: one traced forward pass, then the grouping."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from intrafusion.arguments import checked
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph, Way
from intrafusion.names import name_some
from intrafusion.network.apart import borrow
from intrafusion.network.computed import tell_of_computed
from intrafusion.network.decisions import Decisions, ListsRead, call_ways
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.layers import unseen_by_modes
from intrafusion.network.state import Memory, preserve_state
from intrafusion.network.wrappers import outside_inference, unwrap
from intrafusion.trace.decomposition import decompose
from intrafusion.trace.dispatch import Tracer
from intrafusion.trace.fixed import find_fixed_sides
from intrafusion.trace.groups import build_graph
from intrafusion.trace.info import LabelledTensor
from intrafusion.trace.ledger import Ledger
from intrafusion.trace.random import Draws
from intrafusion.trace.ways import Ways, block_unseen, find_more_ways, find_ways


@checked
@outside_inference
def trace(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    calls: int | None = None,
    ways: tuple[Way, ...] | None = None,
) -> ChannelGraph:
    """Find the coupled channel groups of a network from one run on an example input.

    The network may be frozen, in half precision, in training or evaluation mode; it is traced in evaluation mode and
    left exactly as it was found. Where a forward goes by the values of its tensors, all the ways through it are
    followed that are found, see `trace.ways`.

    Args:
        model: any eager PyTorch module.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; a batch of one will do.
        calls: how many in a row; by default two where the first leaves a state in an attribute, else one.
        ways: through a forward that goes by values, `ChannelGraph.ways` of the network that this one was made from; by
            default they are looked for.
    Returns:
        every group, in execution order; those that cannot be reduced say why.
    Raises:
        ModelError: the network does not run on the example inputs, or has uninitialised (lazy) parameters.
    """
    return trace_private(borrow(unwrap(model)), Inputs.of(example_inputs), calls=calls, ways=ways)


def trace_private(
    model: nn.Module, inputs: Inputs, *, calls: int | None = None, ways: tuple[Way, ...] | None = None
) -> ChannelGraph:
    """The same for a network that no other thread knows: it is not copied, and errors come from its own modules."""
    run = _run_first_possible(model, inputs, calls, ways or ())
    if ways is None and run.reads:
        found = find_ways(model, run.inputs, inputs)
        return _follow_ways(model, run if len(found.followed) < 2 else _run_along(model, run, found), found)
    return _build(model, run, ways or ())


@checked
@outside_inference
def trace_more(
    model: nn.Module, example_inputs: ExampleInputs, graph: ChannelGraph, given: Iterable[Inputs]
) -> ChannelGraph | None:
    """The same for a network whose forward goes by values, with the ways that other inputs take.

    Returns:
        None where these take none that is not in `graph.ways`.
    """
    model, inputs = borrow(unwrap(model)), Inputs.of(example_inputs)
    run = _run_first_possible(model, inputs, graph.calls, ())
    found = find_more_ways(model, run.inputs, graph.ways, given)
    return None if found is None else _follow_ways(model, _run_along(model, run, found), found)


def _run_along(model: nn.Module, run: _Run, found: Ways) -> _Run:
    return _run(model, run.inputs, run.calls, found.followed)


def _follow_ways(model: nn.Module, run: _Run, found: Ways) -> ChannelGraph:
    """The graph of all ways that were found; what those may share that were not is left alone."""
    graph = _build(model, run, found.followed, found.places)
    return graph if found.whole else block_unseen(graph, found)


def _build(model: nn.Module, run: _Run, ways: tuple[Way, ...], places: Sequence[str] = ()) -> ChannelGraph:
    seen = (_warn_of_unreached(model, run.ledger), _warn_of_unopened(run), _warn_of_draws(run))
    notes = (*seen, tell_of_computed(model), _tell_of(ways, places))
    found = (run.ledger.relations, run.ledger.shapes, run.ledger.origins, tuple(chain(*notes)))
    graph = build_graph(*found, _list_weights_as_wide(model))
    return replace(graph, calls=run.calls, fixed=find_fixed_sides(run.ledger, graph), ways=ways)


def _list_weights_as_wide(model: nn.Module) -> Iterator[list[str]]:
    """Of every recurrent module the weights of all layers and directions that read its one `hidden_size`."""
    for prefix, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            names = [f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
            yield from ([name for name in names if f"weight_{kind}_" in name] for kind in ("hh", "hr"))


@contextlib.contextmanager
def answered(ways: Sequence[Way]) -> Iterator[None]:
    """Inside, a network decides as the first of these does."""
    with Decisions(ways[0].answers).played() if ways else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def follow_run(tracer: Tracer, model: nn.Module, inputs: Inputs) -> Iterator[Memory]:
    """Where a forward pass under this tracer shows every step; the network is left as it was found."""
    _learn_inputs(tracer.ledger, inputs)
    with preserve_state(model) as memory, torch.no_grad(), decompose(model), tracer.naming_modules(model):
        yield memory


@dataclass(eq=False)
class _Run:
    """What one traced run found.

    Attributes:
        inputs: on which it ran.
        calls: forward calls in a row that were followed.
        reads: whether the forward goes by the values of its tensors.
        draws: operations that draw random numbers.
        closed: kinds of objects in the output that could not be looked into.
    """

    ledger: Ledger
    inputs: Inputs
    calls: int = 1
    reads: bool = False
    draws: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)


def _run_first_possible(model: nn.Module, inputs: Inputs, calls: int | None, ways: Sequence[Way]) -> _Run:
    """On inputs with no two values alike, or as they are; called once where a second call in a row is not taken."""
    attempts = [(inputs.varied(), calls), (inputs, calls), *([(inputs, 1)] if calls is None else [])]
    for given, count in attempts[:-1]:
        try:
            return _run(model, given, count, ways)
        except ModelError:  # not every network takes other values (an index, a mask), or two calls in a row
            continue
    given, count = attempts[-1]
    return _run(model, given, count, ways)


def _run(model: nn.Module, inputs: Inputs, calls: int | None, ways: Sequence[Way] = ()) -> _Run:
    """One traced forward pass, two where the network keeps something from call to call; outputs may not move.

    Args:
        ways: that are followed too, each in a pass of its own, but for the first.
    """
    run = _Run(Ledger(model), inputs)
    tracer, follow = Tracer(run.ledger), lambda given: follow_call(run.ledger, model, given)
    with follow_run(tracer, model, inputs) as memory:
        with tracer, Draws(mean=True) as draws, ListsRead() as lists, answered(ways):
            opened = inputs.opened(model)
            outputs = [
                *opened.tensors,
                *_call_again(run, model, inputs, memory.rebound if calls is None else calls > 1),
            ]
        with tracer, Draws(mean=True):
            outputs += call_ways(follow, inputs, 0, ways)
        run.closed, run.draws, run.reads = opened.closed, draws.names, lists.found or tracer.decides
        names = {id(t): name for name, tensors in reversed(opened.entries) for t in tensors}
        for output in outputs:
            _fix_output(run.ledger, output, names.get(id(output)))
    return run


def _learn_inputs(ledger: Ledger, inputs: Inputs) -> None:
    """No channel runs along what a network is called on; that is no step of the network."""
    with unseen_by_modes():
        for given in inputs.tensors():
            ledger.learn(given, LabelledTensor.fixed(given.shape))


def follow_call(ledger: Ledger, model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """A call on inputs of another way, under a tracer with this ledger."""
    _learn_inputs(ledger, inputs)
    return inputs.call(model)


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


def _tell_of(ways: Sequence[Way], places: Sequence[str]) -> tuple[str, ...]:
    if len(ways) < 2:
        return ()
    where = f" ({name_some([Path(place).name for place in places])})" if places else ""
    return (
        f"the forward goes by the values of its tensors{where}; {len(ways)} ways through it were followed, found by "
        "other answers to what it reads and on other inputs.",
    )


def _warn_of_draws(run: _Run) -> tuple[str, ...]:
    if not run.draws:
        return ()
    return (
        f"the forward draws random numbers in evaluation mode too ({', '.join(run.draws)}); it was traced and proved "
        "with their mean where they have the shape of a tensor, else from one seed.",
    )
