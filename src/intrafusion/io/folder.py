"""A compressed network as a folder: weights in safetensors, plan and recipe; nothing pickled or half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from intrafusion.errors import FolderError, PlanError
from intrafusion.io.atomic import atomic_folder
from intrafusion.io.extra import PREFIX, extra_state, set_extra_state_
from intrafusion.measure.size import Size
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.network.wrappers import unwrap
from intrafusion.plan import Plan
from intrafusion.reduce import ReductionMap
from intrafusion.surgery.lowrank import ranks_of, split_layers_
from intrafusion.surgery.write import Repair, make_repairs_, put_data_

_WEIGHTS, _PLAN, _RECIPE, _MAPS_FILE = "model.safetensors", "plan.json", "recipe.yaml", "maps.safetensors"
_KIND = "intrafusion"


def is_ours(folder: Path) -> bool:
    """Whether a folder was written by `save` or `save_plan`."""
    try:
        return json.loads((folder / _PLAN).read_text()).get("kind") == _KIND
    except (OSError, ValueError, AttributeError):
        return False


def save(
    model: nn.Module,
    plan: Plan,
    folder: str | os.PathLike[str],
    *,
    repairs: tuple[Repair, ...],
    before: Size,
    after: Size,
    told: Mapping[str, Any] | None = None,
) -> None:
    """Write model.safetensors, plan.json and recipe.yaml. The folder appears complete or not at all.

    Args:
        told: more for plan.json, of values that JSON has.
    Raises:
        FolderError: the folder exists and is not one of ours.
    """
    model = unwrap(model)
    state = {name: t.detach().cpu().contiguous().clone() for name, t in named_tensors(model).items()}
    kept, tensors = extra_state(model)
    extra = {
        "weights": _WEIGHTS,
        "extra_state": kept,
        "repairs": [asdict(r) for r in repairs],
        "before": asdict(before),
        "after": asdict(after),
        "split_before": (split := _ranks_before(model, plan)),
        "split_after": {name: rank for name, rank in ranks_of(model).items() if name not in split},
        **(told or {}),
    }
    with atomic_folder(folder, ours=is_ours) as target:
        save_file({**state, **tensors}, target / _WEIGHTS)
        (target / _PLAN).write_text(_build_document(plan, extra))
        (target / _RECIPE).write_text(plan.recipe.to_yaml())


def _ranks_before(model: nn.Module, plan: Plan) -> dict[str, int]:
    """Rank before the plan of every layer that was of low rank already then, by name."""
    groups = {name: int(getattr(model.get_submodule(f"{name}.reduce"), "groups", 1)) for name in ranks_of(model)}
    shapes = {name: plan.shapes.get(f"{name}.reduce.weight") for name in groups}
    return {name: shape[0] // groups[name] for name, shape in shapes.items() if shape is not None}


def _build_document(plan: Plan, extra: dict[str, Any]) -> str:
    return json.dumps({"kind": _KIND, **json.loads(plan.to_json()), **extra}, indent=1)


def load(folder: str | os.PathLike[str], model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """A saved network back in one line.

    Args:
        folder: what `Compressed.save` wrote.
        model: the original class or factory (called without arguments), or an instance of the original network,
            which becomes the smaller one.
    Returns:
        the smaller network, on the device and in the mode of the original; its weights have the saved dtype.
    Raises:
        FolderError: not one of our folders, damaged, or it points outside itself.
        PlanError: the original network is another one than the saved one was made from.
    """
    folder = Path(folder)
    data = read_document(folder)
    plan = Plan.from_json(json.dumps(data))
    given = model if isinstance(model, nn.Module) else _build_from(model)
    network = unwrap(given)
    tensors = _read_tensors(_weights_path(folder, data))
    state = {name: t for name, t in tensors.items() if not name.startswith(PREFIX)}
    if _read_splits(data, "split_before") or _read_splits(data, "split_after"):
        _prepare_(copy_model(network), folder, data, plan, state)  # so that an error leaves the network as it is
    extra = {name: t for name, t in tensors.items() if name.startswith(PREFIX)}
    set_extra_state_(
        copy_model(network), data.get("extra_state", {}), extra
    )  # so that an error leaves the network as it is
    for name, tensor in _prepare_(network, folder, data, plan, state).items():
        put_data_(tensor, state[name].to(tensor.device))
        tensor.grad = None
    set_extra_state_(network, data.get("extra_state", {}), extra)
    return given


def _prepare_(
    network: nn.Module, folder: Path, data: dict[str, Any], plan: Plan, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Give a network the layers and sizes that were saved (in place), and return the tensors to write to."""
    split_layers_(network, _read_splits(data, "split_before"))
    tensors = named_tensors(network)
    plan.check_fits({n: tuple(t.shape) for n, t in tensors.items() if t.is_floating_point()})
    repairs, after = _read_repairs(data, network), _read_splits(data, "split_after")
    if not after:
        _check_tensor_names(folder, tensors, state)
    make_repairs_(network, repairs)
    split_layers_(network, after)
    tensors = named_tensors(network)
    _check_tensor_names(folder, tensors, state)
    return tensors


def _read_splits(data: dict[str, Any], key: str) -> dict[str, int]:
    """Layers of low rank that a folder names; none in folders of before there were any."""
    found = data.get(key, {})
    if not isinstance(found, dict):
        raise PlanError(f"{_PLAN}: damaged, {key} is no table of ranks.")
    return found


def _build_from(factory: Callable[[], nn.Module]) -> nn.Module:
    if not callable(factory):
        raise PlanError(
            f"load: expected a class, a factory or an instance of the original network, got {type(factory).__name__}."
        )
    name = getattr(factory, "__name__", type(factory).__name__)
    try:
        network = factory()
    except TypeError as error:
        raise PlanError(
            f"load: {name} cannot be called without arguments ({error}); pass a factory, "
            f"lambda: {name}(...), or an instance of the original network."
        ) from error
    if not isinstance(network, nn.Module):
        raise PlanError(f"load: expected a network or a factory of one, got a factory of {type(network).__name__}.")
    return network


def read_document(folder: Path) -> dict[str, Any]:
    path = folder / _PLAN
    if not path.is_file():
        raise FolderError(f"{folder}: expected a folder saved by intrafusion, but it has no {_PLAN}.")
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise FolderError(f"{path}: damaged, not JSON ({error}).") from error
    if not isinstance(data, dict) or data.get("kind") != _KIND:
        raise FolderError(f"{path}: this is not a plan of intrafusion; expected a folder that Compressed.save wrote.")
    return data


def _weights_path(folder: Path, data: dict[str, Any]) -> Path:
    """The weight file, which must lie in the folder itself."""
    name = data.get("weights")
    if not isinstance(name, str):
        raise FolderError(f"{folder / _PLAN}: names no weight file; this is a plan alone, load it with Plan.")
    if PurePosixPath(name).name != name or "\\" in name or name in ("", ".", ".."):
        raise FolderError(f"{folder / _PLAN}: its weight file {name!r} points outside the folder; refused.")
    path = folder / name
    if path.is_symlink() and path.resolve().parent != folder.resolve():
        raise FolderError(f"{path}: is a link out of the folder; refused.")
    return path


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FolderError(f"{path.parent}: has no {path.name}; it was not saved completely, or something was removed.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise FolderError(
            f"{path}: not a safetensors file, or a damaged one ({error}); save or fetch it again."
        ) from error


def _check_tensor_names(folder: Path, tensors: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    missing, extra = sorted(set(tensors) - set(state)), sorted(set(state) - set(tensors))
    if missing or extra:
        raise PlanError(
            f"{folder}: its weights are for another network; "
            f"missing {missing[:3] or 'none'}, unexpected {extra[:3] or 'none'}."
        )


def _read_repairs(data: dict[str, Any], network: nn.Module) -> tuple[Repair, ...]:
    """Attributes to set, checked: only sizes, and only where the module has the size that was recorded before."""
    modules, repairs = dict(network.named_modules()), []
    for entry in data.get("repairs", []):
        try:
            repair = Repair(entry["module"], entry["attribute"], _as_size(entry["old"]), _as_size(entry["new"]))
            present = getattr(modules[repair.module], repair.attribute, None)
        except (KeyError, TypeError) as error:
            raise PlanError(f"{_PLAN}: damaged, {entry!r} is no repair of this network.") from error
        if not _is_size(present) or not _is_size(repair.new) or present != repair.old:
            raise PlanError(
                f"{_PLAN}: {repair.module}.{repair.attribute} is no size of this network, or not {repair.old}; "
                "it was made from another network."
            )
        repairs.append(repair)
    return tuple(repairs)


def _as_size(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_size(value: Any) -> bool:
    return type(value) is int or (isinstance(value, tuple) and all(type(v) is int for v in value))


def save_plan(plan: Plan, folder: str | os.PathLike[str]) -> None:
    """Write a plan with its maps, to be carried out later with `intrafusion.apply`."""
    tensors = {
        f"{kind}/{name}": getattr(m, kind).cpu().contiguous()
        for name, m in plan.maps.items()
        for kind in ("merge", "unmerge", "shift")
        if getattr(m, kind) is not None
    }
    with atomic_folder(folder, ours=is_ours) as target:
        save_file(tensors, target / _MAPS_FILE)
        (target / _PLAN).write_text(_build_document(plan, {}))
        (target / _RECIPE).write_text(plan.recipe.to_yaml())


def load_plan(folder: str | os.PathLike[str]) -> Plan:
    """Read what `save_plan` wrote.

    Raises:
        FolderError: not one of our folders, or one without maps.
    """
    folder = Path(folder)
    data = read_document(folder)
    if not (folder / _MAPS_FILE).is_file():
        raise FolderError(f"{folder}: has no {_MAPS_FILE}; it holds a network (intrafusion.load), not a plan to apply.")
    tensors = _read_tensors(folder / _MAPS_FILE)
    names = [k.removeprefix("merge/") for k in tensors if k.startswith("merge/")]
    maps = {
        name: ReductionMap(tensors[f"merge/{name}"], tensors[f"unmerge/{name}"], tensors.get(f"shift/{name}"))
        for name in names
    }
    return Plan.from_json(json.dumps(data), maps)
