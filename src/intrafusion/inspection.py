"""A network made workable, and traced into groups of channels that are proved."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.arguments import checked
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph
from intrafusion.network.apart import borrow
from intrafusion.network.calibration_images import Calls
from intrafusion.network.held_out import Split
from intrafusion.network.input_batches import Batches
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.network.wrappers import check_inplace, holds_inference_tensors, outside_inference, unwrap
from intrafusion.progress import ShowProgress, report, shows_progress
from intrafusion.recipe import Recipe
from intrafusion.surgery.permute import add_reasons, verify_groups
from intrafusion.surgery.untie import undo_ties
from intrafusion.surgery.widths import tie_widths
from intrafusion.trace import trace
from intrafusion.trace.run import trace_more

_LOOKED_AT = 256  # batches, for other ways through a forward than the example takes
_UNFIT = {
    "meta": "it holds no values there; load its weights first",
    "mps": "that has no float64, in which maps are solved and proved; use model.cpu(), and move the result back",
}
"""Devices that a network cannot be on, and why."""


def make_workable(model: Any, *, inplace: bool = False) -> nn.Module:
    """The network inside its wrappers, of ordinary tensors, with nobody else to call it.

    Raises:
        ModelError: no network that can be worked on, see `wrappers`.
    """
    core = unwrap(model)
    if inplace:
        check_inplace(model)
    with torch.inference_mode(False):
        return copy_model(core) if holds_inference_tensors(core) else borrow(core)


def prepare_model(model: nn.Module, recipe: Recipe, example_inputs: ExampleInputs) -> nn.Module:
    """The network that a recipe is for: the same, or one whose ties are undone.

    Raises:
        ModelError: they cannot be, see `undo_ties`.
    """
    return undo_ties(unwrap(model), recipe.call_of(example_inputs)) if recipe.untie else model


@checked
@outside_inference
@shows_progress("inspect")
def inspect(model: nn.Module, example_inputs: ExampleInputs, *, progress: ShowProgress = None) -> ChannelGraph:
    """Trace a network into channel groups and prove each of them by a permutation."""
    model, inputs = make_workable(model), Inputs.of(example_inputs)
    masks = check_weights(model)
    report("tracing the network", 0)
    graph = trace(model, inputs)
    report("tracing the network", 1)
    return _prove(model, graph, inputs, masks)


def _prove(model: nn.Module, graph: ChannelGraph, inputs: Inputs, masks: Collection[str]) -> ChannelGraph:
    report("proving channel groups", 0)
    graph = tie_widths(_leave_masks_alone(verify_groups(model, graph, inputs), masks), model, inputs)
    report("proving channel groups", 1)
    return graph


def follow_given(
    model: nn.Module, graph: ChannelGraph, inputs: Inputs, calls: Calls | None, split: Split
) -> ChannelGraph:
    """The graph with the ways that given inputs, as they come and as they are parted, take through a forward."""
    if calls is None or not graph.ways:
        return graph
    parts = [part for part in (split.seen, split.measured) if isinstance(part, Batches)]
    found = trace_more(model, inputs, graph, chain(islice(calls, _LOOKED_AT), *parts))
    return graph if found is None else _prove(model, found, inputs, _find_broken(model))


def check_weights(model: nn.Module) -> list[str]:
    """Names of the tensors that hold infinities or NaN on purpose.

    Raises:
        ModelError: others do, or they are on a device that is of no use here.
    """
    for name, tensor in named_tensors(model).items():
        if tensor.device.type in _UNFIT:
            raise ModelError(
                f"{name}: expected weights on the CPU or a GPU, got {tensor.device}: {_UNFIT[tensor.device.type]}."
            )
    broken = _find_broken(model)
    masks = _find_masks(model) if broken else broken
    for name in broken:
        if name not in masks:
            raise ModelError(
                f"{name}: expected finite weights, got NaN or infinity; the network was saved broken, load another."
            )
    return broken


def _find_broken(model: nn.Module) -> list[str]:
    """Names of the tensors with infinite or NaN entries."""
    return [name for name, tensor in named_tensors(model).items() if not tensor.is_meta and not _is_finite(tensor)]


def _is_finite(tensor: Tensor) -> bool:
    """A sum that is finite, which is quickly seen, shows that all is; one that is not may have overflowed."""
    quick = tensor.dtype in (torch.float32, torch.float64) and bool(tensor.detach().sum().isfinite())
    return quick or bool(torch.isfinite(tensor).all())


def _leave_masks_alone(graph: ChannelGraph, masks: Collection[str]) -> ChannelGraph:
    """The graph without groups along which a mask has infinite or NaN entries: such cannot be mixed."""
    reasons = {
        group.name: f"{member.tensor} has infinite or NaN entries along these channels"
        for group in graph.reducible for member in group.members if member.tensor in masks
    }  # fmt: skip
    return add_reasons(graph, reasons)


def _find_masks(model: nn.Module) -> set[str]:
    """Tensors that may hold infinities or NaN on purpose: buffers, and frozen parameters of two values.

    What a norm remembers of its inputs is not among them.
    """
    own = {n for n, b in model.named_buffers() if n.rpartition(".")[2] not in ("running_mean", "running_var")}
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    return own | {n for n, p in frozen.items() if not p.isnan().any() and len(p.unique()) <= 2}
