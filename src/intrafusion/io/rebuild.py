"""Build the original of a saved network from its source alone, and find out the source of a network.

A folder is not trusted: on the meta device, where nothing is allocated, the network must turn out as the plan has it
before it is built with values; building stops where it has more layers or weights than that.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from intrafusion.errors import FolderError, ModelError
from intrafusion.network.double import TOLERANCE, copy_as_double, output_difference, run_in_double
from intrafusion.network.identity import Identity, describe_layers
from intrafusion.network.inputs import Inputs
from intrafusion.network.provenance import Source, configs_of, get_source
from intrafusion.network.sources import SourceKind, find_timm, import_torchvision
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import named_tensors
from intrafusion.plan import Plan
from intrafusion.surgery.lowrank import shapes_when_split

_FREE = 10**8  # entries that an original may have however small the saved network is: 400 MB
_MOST_TIMES = 50


def rebuild(source: Source, plan: Plan, saved: int) -> nn.Module:
    """The original network, with random weights, in evaluation mode, on the CPU.

    Args:
        saved: entries of the tensors in the folder.
    Raises:
        PlanError: another network than the plan was made for.
        FolderError: the plan names an original that is far larger than what was saved of it.
        ModelError: it cannot be built.
    """
    _build_shapes(source, plan, saved)
    entries = _entries(plan)
    if entries > max(_FREE, _MOST_TIMES * saved):
        raise FolderError(
            f"{source}: the folder names an original of {entries:,} entries for {saved:,} that it holds; "
            "if that is right, give the network: intrafusion.load(folder, network)."
        )
    with _bounded(plan, saved):
        network = source.build()
    plan.check_fits(_float_shapes(network, plan))
    return network


def _build_shapes(source: Source, plan: Plan, saved: int) -> None:
    """Raises PlanError unless the source gives the tensors of the plan; some networks need values to be built."""
    try:
        with _bounded(plan, saved), torch.device("meta"):
            found = _float_shapes(source.build(), plan)
    except ModelError:
        if source.kind is SourceKind.HF:  # its sizes are free, those of the others are bounded by name
            raise
        return
    plan.check_fits(found)


def _float_shapes(network: nn.Module, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Of its tensors once it has the layers as two that the plan has so."""
    shapes = {n: tuple(t.shape) for n, t in named_tensors(network).items() if t.is_floating_point()}
    return shapes_when_split(shapes, plan.split)


def _entries(plan: Plan) -> int:
    return sum(math.prod(shape) for shape in plan.shapes.values())


@contextlib.contextmanager
def _bounded(plan: Plan, saved: int) -> Iterator[None]:
    """Inside, building a network fails once it has far more modules, tensors or entries than the plan's and saved."""
    tensors, entries = 3 * len(plan.shapes) + 100, 3 * (_entries(plan) + saved) + 10**6
    left = {"tensors": tensors, "entries": entries, "modules": 10 * tensors + 1000}

    def spend(what: str, amount: int) -> None:
        left[what] -= amount
        if left[what] < 0:
            raise FolderError(
                f"the folder names a network with far more {what} than its plan has; it is damaged, or means harm."
            )

    def see_tensor(module: nn.Module, name: str, tensor: Any) -> None:
        if isinstance(tensor, Tensor):
            spend("tensors", 1)
            spend("entries", tensor.numel())

    handles = (
        hooks.register_module_parameter_registration_hook(see_tensor),
        hooks.register_module_buffer_registration_hook(see_tensor),
        hooks.register_module_module_registration_hook(lambda *_: spend("modules", 1)),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- which source a network has -------------------------------------------------------------------------------------


def find_source(
    small: nn.Module, original: Identity, plan: Plan, inputs: Inputs, fill_: Callable[[nn.Module], None]
) -> Source | None:
    """The source whose network, filled with what is saved, is the smaller one: the same layers and outputs.

    Args:
        fill_: makes an original the smaller network, as loading does.
    """
    saved = sum(t.numel() for t in named_tensors(small).values())
    with contextlib.suppress(Exception):  # a package that does not import; the network is saved all the same
        for candidate in _candidates(small, plan, inputs):
            with contextlib.suppress(Exception):  # another network, or one that cannot be built from plain values
                source = replace(candidate, args=json.loads(json.dumps(dict(candidate.args))))
                network = rebuild(source, plan, saved)
                if describe_layers(network) == dict(original.layers):
                    fill_(network)
                    if _is_same(network, small, inputs):
                        return source
    return None


def _is_same(network: nn.Module, small: nn.Module, inputs: Inputs) -> bool:
    """Whether both give the same outputs: to the bit, or in float64 where kernels differ."""
    device = next((t.device for t in named_tensors(small).values()), torch.device("cpu"))
    found, expected = (_outputs(m, inputs) for m in (network.to(device), small))
    if len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
        return True
    found, expected = (run_in_double(copy_as_double(m), inputs) for m in (network, small))
    return len(found) == len(expected) and output_difference(found, expected) <= TOLERANCE


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with preserve_state(model):
        return inputs.call(model)


def _candidates(model: nn.Module, plan: Plan, inputs: Inputs) -> Iterator[Source]:
    """What the network says of itself, or what of its package it could be."""
    package = type(model).__module__.partition(".")[0]
    said = get_source(model)
    if said is not None:
        yield said
    if package == SourceKind.TIMM:
        yield from _find_timm_names(model, inputs)
    elif package == SourceKind.TORCHVISION:
        yield from _find_torchvision_names(model, plan)
    else:
        yield from (Source(SourceKind.HF, type(model).__name__, config) for config in configs_of(model))


def _find_timm_names(model: nn.Module, inputs: Inputs) -> Iterator[Source]:
    config: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    name = config.get("architecture") if isinstance(config, dict) else getattr(config, "architecture", None)
    if not isinstance(name, str):
        return
    with contextlib.suppress(ModelError):
        find_timm(name)
        classes, pool = getattr(model, "num_classes", None), getattr(model, "global_pool", None)
        base = {"num_classes": classes} if type(classes) is int else {}
        shape = next((tuple(t.shape) for t in inputs.tensors() if t.dim() == 4), (1, 3, 224, 224))
        further = ({"in_chans": shape[1]}, {"img_size": list(shape[2:])}, {"global_pool": pool})
        for count in range(len(further) + 1):
            for chosen in itertools.combinations(further, count):
                args = base | {k: v for part in chosen for k, v in part.items()}
                if all(v is not None for v in args.values()):
                    yield Source(SourceKind.TIMM, name, args)


def _find_torchvision_names(model: nn.Module, plan: Plan) -> Iterator[Source]:
    models = import_torchvision().models
    *_, (last, _) = model.named_parameters()  # the head, whose outputs are the classes
    aux = {"aux_logits": model.aux_logits} if hasattr(model, "aux_logits") else {}
    for name in models.list_models():
        if models.get_model_builder(name).__module__ == type(model).__module__:
            yield Source(SourceKind.TORCHVISION, name, aux)
            yield Source(SourceKind.TORCHVISION, name, {**aux, "num_classes": plan.shapes[last][0]})
