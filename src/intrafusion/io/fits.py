"""Whether what lies in a folder can be what the network becomes by the plan: asked before anything is written."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from intrafusion.errors import FolderError, PlanError
from intrafusion.plan import Plan
from intrafusion.surgery.write import find_attributes, find_own_tensors

Shapes = Mapping[str, tuple[int, ...]]

_MEMBER = re.compile(r"(?P<tensor>.*)\[(?P<dim>\d+)\] ")


def check_shapes(folder: Path, plan: Plan, before: Shapes, state: Mapping[str, Tensor]) -> None:
    """Only dimensions that a reduced group runs through may differ from the network's, and only become smaller.

    Raises:
        PlanError: another shape than the plan can lead to.
    """
    shrinking = _find_shrinking(plan)
    for name, old in before.items():
        new = tuple(state[name].shape)
        dims = enumerate(zip(old, new, strict=False))
        if len(old) != len(new) or not all(_leads_to(n, m, shrinking.get((name, dim), set())) for dim, (n, m) in dims):
            raise PlanError(
                f"{folder}: {name!r} is saved as {list(new)}, which the plan does not make of {list(old)}; "
                "its weights are for another network, or damaged: fetch or save the folder again."
            )


def _find_shrinking(plan: Plan) -> dict[tuple[str, int], set[tuple[int, int]]]:
    """n and m of the reduced groups that run through each dimension of a tensor; several may have the same n."""
    found: dict[tuple[str, int], set[tuple[int, int]]] = {}
    for decision in plan.decisions:
        for match in (_MEMBER.match(member) for member in decision.members if decision.reduced):
            if match:
                found.setdefault((match["tensor"], int(match["dim"])), set()).add((decision.n, decision.m))
    return found


def _leads_to(old: int, new: int, sizes: Collection[tuple[int, int]]) -> bool:
    """Whether these groups can make one size of the other: exactly theirs where one of them is all of it.

    Else each takes what it loses, at as many places as each of its channels has.

    >>> _leads_to(16, 8, {(8, 4)}), _leads_to(16, 7, {(8, 4)}), _leads_to(16, 6, {(8, 5), (8, 1)})
    (True, False, True)
    """
    if any(n == old for n, _ in sizes):
        return (old, new) in sizes
    lost = [n - m for n, m in sizes]
    return new == old or (bool(sizes) and 1 <= new < old and (old - new) % math.gcd(*lost) == 0)


def check_kinds(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """A network saved in another precision is that precision; but numbers of another kind are none of this network.

    Raises:
        PlanError: a tensor of another kind than the network's.
    """
    for name, tensor in tensors.items():
        own, saved = tensor.dtype, state[name].dtype
        kinds = [(d.is_floating_point, d.is_complex) for d in (own, saved)]
        if own != saved and (kinds[0] != kinds[1] or not any(kinds[0])):
            raise PlanError(
                f"{folder}: {name!r} is saved as {saved}, the network has {own} there; it is for another network."
            )


def check_finite(folder: Path, state: Mapping[str, Tensor], not_finite: Any, parameters: set[str]) -> None:
    """Raises FolderError for an infinite or NaN entry where there was none at saving.

    Args:
        not_finite: names of tensors with such entries when they were saved; None where that was not noted: any buffer.
        parameters: names of what is no buffer.
    """
    allowed = set(state) - parameters if not_finite is None else set(not_finite)
    for name, tensor in state.items():
        if name not in allowed and not is_finite(tensor):
            raise FolderError(
                f"{folder}: {name!r} has infinite or NaN entries, and had none when it was saved; "
                "fetch or save the folder again."
            )


def is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool(torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all())


def find_told(network: nn.Module, shapes: Shapes) -> dict[tuple[str, str], Any]:
    """(module, attribute) -> value of every size attribute that tells the shape of its module's tensors.

    Args:
        shapes: of the tensors, by name; one that is not there is as it stands in the network.
    """
    names = {id(t): n for n, t in (*network.named_parameters(), *network.named_buffers())}
    told = {}
    for name, module in network.named_modules():
        own = {k: shapes.get(names.get(id(t), ""), tuple(t.shape)) for k, t in find_own_tensors(module).items()}
        own |= _find_derived(module, name, shapes)
        if own:
            told |= {(name, key): value for key, value in _expected(module, own).items()}
    return {key: value for key, value in told.items() if _get(network, key) == value}


def _find_derived(module: nn.Module, name: str, shapes: Shapes) -> Shapes:
    """Shapes of the tensors that a parametrization computes, from sources of these shapes."""
    derived: dict[str, tuple[int, ...]] = {}
    if not parametrize.is_parametrized(module):
        return derived
    for key, sources in module.get_submodule("parametrizations").named_children():
        state = {**dict(sources.named_parameters()), **dict(sources.named_buffers())}
        given = {k: t.new_zeros(shapes.get(f"{name}.parametrizations.{key}.{k}", t.shape)) for k, t in state.items()}
        derived[key] = tuple(functional_call(sources, given, ()).shape)
    return derived


def _expected(module: nn.Module, own: Shapes) -> Mapping[str, Any]:
    """The size attributes of a module by its tensors."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return dict.fromkeys(("num_features",), next(shape[0] for shape in own.values() if shape))
    return find_attributes(module, own, own)


def check_told(folder: Path, network: nn.Module, before: Mapping[tuple[str, str], Any], shapes: Shapes) -> None:
    """What told the shape of tensors before must do so now.

    Raises:
        PlanError: an attribute that its tensors contradict.
    """
    names = dict(network.named_modules())
    for module, attribute in sorted(before.keys() - find_told(network, shapes).keys()):
        if module in names and hasattr(names[module], attribute):
            raise PlanError(
                f"{folder}: {module}.{attribute} = {getattr(names[module], attribute)!r} contradicts its tensors; "
                "the repairs in plan.json are damaged: fetch or save the folder again."
            )


def _get(network: nn.Module, key: tuple[str, str]) -> Any:
    return getattr(network.get_submodule(key[0]), key[1], None)
