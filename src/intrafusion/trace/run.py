"""A network and an example input -> its ChannelGraph: one traced forward pass, then the grouping."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.state import preserve_state
from intrafusion.trace.decomposition import decompose
from intrafusion.trace.dispatch import Tracer
from intrafusion.trace.groups import build_graph
from intrafusion.trace.info import LabelledTensor
from intrafusion.trace.ledger import Ledger


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
        ledger = _run_once(model, inputs.varied())
    except ModelError:  # not every network takes other values: an index, a mask
        ledger = _run_once(model, inputs)
    return build_graph(ledger.relations, ledger.shapes, ledger.origins, _warn_of_unreached(model, ledger))


@contextlib.contextmanager
def follow_run(tracer: Tracer, model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Where a forward pass under this tracer shows every step; the network is left as it was found."""
    for given in inputs.tensors():
        tracer.ledger.learn(given, LabelledTensor.fixed(given.shape))
    with preserve_state(model), torch.no_grad(), decompose(model), tracer.naming_modules(model):
        yield


def _run_once(model: nn.Module, inputs: Inputs) -> Ledger:
    """One traced forward pass; input and output channels may not move."""
    ledger = Ledger(model)
    tracer = Tracer(ledger)
    with follow_run(tracer, model, inputs):
        with tracer:
            outputs = inputs.call(model)
        for output in outputs:
            info = ledger.look_up(output)
            ledger.note_read(info, "output of the network")
            ledger.forbid(info, "output of the network")
    return ledger


def _warn_of_unreached(model: nn.Module, ledger: Ledger) -> tuple[str, ...]:
    names = [n for n, _ in model.named_parameters() if n in ledger.shapes and n not in ledger.reached]
    if not names:
        return ()
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return (f"{len(names)} parameters were not used on the example input and are left as they are: {shown}.",)
