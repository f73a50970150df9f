"""A compressed network as a folder: weights in safetensors, plan and recipe; nothing pickled or half-written."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from intrafusion.arguments import checked
from intrafusion.documents import parse_json
from intrafusion.errors import FolderError, ModelError, PlanError
from intrafusion.io.atomic import atomic_folder, read_whole
from intrafusion.io.card import CARD, Words, build_card, is_users_card
from intrafusion.io.checksums import KEY, check_digests, digest_bytes, digest_document, digest_file
from intrafusion.io.extra import PREFIX, extra_state, set_extra_state_
from intrafusion.io.fits import check_finite, check_kinds, check_shapes, check_told, find_told, is_finite
from intrafusion.io.origin import describe_origin, find_other_layers, read_source
from intrafusion.io.pretrained import check_apart, write_pretrained
from intrafusion.io.program import PROGRAM, export_network, read_program
from intrafusion.io.rebuild import find_source, rebuild
from intrafusion.io.tensors import detach_dense, read_tensors
from intrafusion.io.undo import untouched_on_error
from intrafusion.measure.size import Size
from intrafusion.network.calibration_images import warn_of
from intrafusion.network.identity import Identity
from intrafusion.network.inputs import Inputs
from intrafusion.network.provenance import keep_config_
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.network.wrappers import unwrap
from intrafusion.plan import Plan, check_maps
from intrafusion.reduce import ReductionMap
from intrafusion.surgery.configuration import fit_config_, is_configured, is_loadable, refuse_saving_
from intrafusion.surgery.lowrank import ranks_of, split_layers_
from intrafusion.surgery.numbers import find_numbers
from intrafusion.surgery.untie import undo_ties_
from intrafusion.surgery.write import Repair, make_repairs_, put_data_

_WEIGHTS, _PLAN, _RECIPE, _MAPS_FILE = "model.safetensors", "plan.json", "recipe.yaml", "maps.safetensors"
_REST = "rest.safetensors"  # what from_pretrained has no place for
_OURS = (_WEIGHTS, _REST, _PLAN, _RECIPE, _MAPS_FILE, PROGRAM, CARD)
_KIND = "intrafusion"


def is_ours(folder: Path) -> bool:
    """Whether a folder was written by `save` or `save_plan`."""
    try:
        return parse_json((folder / _PLAN).read_bytes()).get("kind") == _KIND
    except (OSError, ValueError, AttributeError):
        return False


@checked
def save(
    model: nn.Module,
    plan: Plan,
    folder: str | os.PathLike[str],
    *,
    repairs: tuple[Repair, ...],
    before: Size,
    after: Size,
    original: Identity | None = None,
    inputs: Inputs | None = None,
    program: bool = False,
    pretrained: Path | None = None,
    told: Mapping[str, Any] | None = None,
    words: Words | None = None,
) -> None:
    """Write model.safetensors, plan.json, recipe.yaml and README.md. The folder appears complete or not at all.

    Of an older folder of ours these files are replaced, and all others stay; a README.md that is the user's own, too.

    Args:
        original: what the network was made from; with `inputs`, its source is looked for.
        inputs: one call of the network.
        program: write program.pt2 too.
        pretrained: folder of the original in the format of Hugging Face: what is written has that format too.
        told: more for plan.json, of values that JSON has.
        words: for the model card.
    Raises:
        FolderError: the folder exists and is not one of ours, or cannot be written.
        ModelError: a tensor without values, or a sparse one; a network that cannot be exported, or that
            `from_pretrained` would not open.
    """
    if pretrained is not None:
        check_apart(Path(folder), pretrained)
    model = unwrap(model)
    state = {name: detach_dense(name, t) for name, t in named_tensors(model).items()}
    kept, tensors = extra_state(model)
    sizes = {"before": before, "after": after}
    extra = {**_describe(model, plan, state, repairs, sizes), "extra_state": kept, **(told or {})}
    files: dict[str, bytes] = {}
    if program and inputs is not None:
        files[PROGRAM], any_batch = export_network(model, inputs)
        extra["program"] = {"any_batch": any_batch}
    if original is not None and inputs is not None:
        data = json.loads(_build_document(plan, extra))
        fill = functools.partial(_fill_, folder=Path(folder), data=data, plan=plan, state={**state, **tensors})
        extra |= describe_origin(original, find_source(model, original, plan, inputs, fill))
    beside = None
    if pretrained is not None:
        extra["pretrained"] = type(model).__name__
        beside = functools.partial(write_pretrained, model, inputs or Inputs(), pretrained.resolve(), ours=_OURS)
    card = build_card(extra, plan, words or Words())
    _write(folder, {**state, **tensors}, files, plan, extra, card, beside)


def _write(
    folder: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    files: Mapping[str, bytes],
    plan: Plan,
    extra: dict[str, Any],
    card: str,
    beside: Callable[[Path], list[str]] | None,
) -> None:
    """
    Args:
        beside: writes more into the folder, and returns the names of it.
    """
    names = {*_OURS, *_list_beside(Path(folder))}
    with atomic_folder(folder, ours=is_ours, names=names, yours=is_users_card) as target:
        extra = {**extra, "beside": [] if beside is None else [n for n in beside(target) if n not in _OURS]}
        extra["weights"], *rest = _write_weights(target, tensors)
        for name, content in files.items():
            (target / name).write_bytes(content)
        digests = {name: digest_file(target / name) for name in (extra["weights"], *rest, *files)}
        extra["rest"] = rest
        (target / _PLAN).write_text(_build_document(plan, {**extra, KEY: digests}))
        (target / _RECIPE).write_text(plan.recipe.to_yaml())
        if not is_users_card(Path(folder) / CARD) or not os.path.lexists(Path(folder) / CARD):
            (target / CARD).write_text(card, encoding="utf-8")


def _write_weights(target: Path, tensors: dict[str, Tensor]) -> list[str]:
    """The files that hold the tensors together: those that `from_pretrained` reads are there already, if any are."""
    there = read_tensors(target / _WEIGHTS) if (target / _WEIGHTS).exists() else {}
    same = [name for name, t in there.items() if name in tensors and torch.equal(t, tensors[name])]
    if there and len(same) == len(there):
        rest = {name: tensor for name, tensor in tensors.items() if name not in there}
        if rest:
            save_file(rest, target / _REST)
        return [_WEIGHTS, *([_REST] if rest else [])]
    own = _REST if there else _WEIGHTS
    save_file(tensors, target / own)
    return [own]


def _list_beside(folder: Path) -> list[str]:
    """What an older folder of ours has in the format of Hugging Face, which goes with the network in it."""
    if not is_ours(folder):
        return []
    found = read_document(folder).get("beside", [])
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _describe(
    model: nn.Module, plan: Plan, state: Mapping[str, Tensor], repairs: tuple[Repair, ...], sizes: Mapping[str, Size]
) -> dict[str, Any]:
    """What loading needs beside the plan and the tensors, and the sizes."""
    split = _ranks_before(model, plan)
    return {
        "training": model.training,
        "from_pretrained": is_loadable(model),
        "repairs": [asdict(r) for r in repairs],
        **{name: asdict(size) for name, size in sizes.items()},
        "split_before": split,
        "split_after": {name: rank for name, rank in ranks_of(model).items() if name not in split},
        "not_finite": [name for name, tensor in state.items() if not is_finite(tensor)],
    }


def _ranks_before(model: nn.Module, plan: Plan) -> dict[str, int]:
    """Rank before the plan of every layer that was of low rank already then, by name."""
    groups = {name: int(getattr(model.get_submodule(f"{name}.reduce"), "groups", 1)) for name in ranks_of(model)}
    shapes = {name: plan.shapes.get(f"{name}.reduce.weight") for name in groups}
    return {name: shape[0] // groups[name] for name, shape in shapes.items() if shape is not None}


def _build_document(plan: Plan, extra: dict[str, Any]) -> str:
    data = {"kind": _KIND, **json.loads(plan.to_json()), **extra}
    data[KEY] = {**data.get(KEY, {}), _PLAN: digest_document(json.loads(json.dumps(data)))}
    return json.dumps(data, indent=1)


@partial(checked, leaving=("model",))
def load(
    folder: str | os.PathLike[str],
    model: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    trust_program: bool = False,
) -> nn.Module:
    """A saved network back in one line.

    All is checked before anything is written: after an error the network is as it was.

    Args:
        folder: what `Compressed.save` wrote.
        model: the original class or factory (called without arguments), or an instance of the original network,
            which becomes the smaller one. Networks of the zoo, torchvision, timm and transformers need none: they are
            built from what the folder records, in evaluation mode.
        trust_program: where there is no `model`, and none is recorded or can be built, load the program that
            `save(program=True)` wrote. Only for folders of people you trust: loading a program can run code.
    Returns:
        the smaller network, on the device of the original; its weights have the saved dtype. An instance stays in its
        mode; what was saved in evaluation mode and is built here is in evaluation mode. Of a program, a network that
        computes, in evaluation mode and on the CPU.
    Raises:
        FolderError: not one of our folders, damaged, it points outside itself, or it does not tell its network.
        PlanError: the original network is another one than the saved one was made from.
        ModelError: the original network has no values to be replaced, or cannot be built.
    Warns:
        IntrafusionWarning: layers of the network are of other classes, or were made otherwise, than when it was saved.
    """
    folder = Path(folder)
    data, state, program, digests = read_whole(folder, functools.partial(_read_network, program=trust_program))
    plan = Plan.from_json(json.dumps(data))
    if model is not None:
        given = model if isinstance(model, nn.Module) else _build_from(model)
        _check_has_values(unwrap(given))
        _fill_(unwrap(given), folder, data, plan, state, digests)
        if given is not model and data.get("training") is False:  # older folders do not say
            given.eval()
        return given
    check_digests(folder, data, digests)
    try:
        network = rebuild(read_source(folder, data), plan, sum(t.numel() for t in state.values()))
    except ModelError:
        if program is None:
            raise
        return read_program(folder / PROGRAM, program, state)
    _fill_(network, folder, data, plan, state)
    return network


def _fill_(
    network: nn.Module,
    folder: Path,
    data: dict[str, Any],
    plan: Plan,
    state: dict[str, Tensor],
    digests: Mapping[str, str] | None = None,
) -> None:
    """Make an original network the saved one (in place), or leave it as it was."""
    extra = {name: t for name, t in state.items() if name.startswith(PREFIX)}
    state = {name: t for name, t in state.items() if name not in extra}
    try:
        with untouched_on_error(network):
            tensors, warning = _prepare_(network, folder, data, plan, state)
            check_digests(folder, data, digests or {})
            warn_of(warning)
            # Tried on a copy first: what a module does with its extra state cannot be undone.
            set_extra_state_(copy_model(network), data.get("extra_state", {}), extra)
            for name, tensor in tensors.items():
                put_data_(tensor, state[name].to(tensor.device))
                tensor.grad = None
            _fit_config_(network, data, plan)
            set_extra_state_(network, data.get("extra_state", {}), extra)
    except (AttributeError, RuntimeError, TypeError) as error:  # an attribute or a tensor that cannot be set
        raise ModelError(f"{folder}: {type(network).__name__} does not take its tensors: {error}.") from error


def _fit_config_(network: nn.Module, data: Mapping[str, Any], plan: Plan) -> None:
    """Of a network of transformers, as it was when it was saved."""
    keep_config_(network, network)
    if plan.sizes and fit_config_(network) is None and data.get("from_pretrained") is False and is_configured(network):
        refuse_saving_(network, "no configuration was found that says what the tensors are")


def _read_network(
    folder: Path, *, program: bool
) -> tuple[dict[str, Any], dict[str, Tensor], bytes | None, dict[str, str]]:
    """plan.json, the tensors, the content of the program if it is wanted, and checksums of all."""
    data = read_document(folder)
    path = _weights_path(folder, data.get("weights"))
    tensors, content = read_tensors(path), None
    digests = {path.name: digest_file(path), _PLAN: digest_document(data)}
    for name in _names(data, "rest") or ():
        rest = _weights_path(folder, name)
        tensors |= read_tensors(rest)
        digests[rest.name] = digest_file(rest)
    if program and (folder / PROGRAM).is_file():
        content = (folder / PROGRAM).read_bytes()
        digests[PROGRAM] = digest_bytes(content)
    return data, tensors, content, digests


def _check_has_values(network: nn.Module) -> None:
    for name, tensor in named_tensors(network).items():
        if is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided:
            raise ModelError(
                f"load: {name!r} of the network has no dense values ({type(tensor).__name__}, {tensor.layout}, "
                f"device {tensor.device}); build the network on a device, run a lazy one once, then load."
            )


def _prepare_(
    network: nn.Module, folder: Path, data: dict[str, Any], plan: Plan, state: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Give a network the layers and sizes that were saved (in place).

    Returns:
        the tensors to write to, and what there is to warn of.
    """
    if plan.recipe.untie:
        undo_ties_(network)
    halved, own = _read_splits(data, "split_before"), ranks_of(network)  # one that was loaded has them
    _split_(network, {n: rank for n, rank in halved.items() if n not in plan.split and own.get(n) != rank})
    warning = find_other_layers(folder, data, network)
    _split_(network, dict(plan.split))
    tensors = named_tensors(network)
    before = {n: tuple(t.shape) for n, t in tensors.items()}
    plan.check_fits({n: before[n] for n, t in tensors.items() if t.is_floating_point()})
    told = find_told(network, before)
    repairs, after = _read_repairs(data, network), _read_splits(data, "split_after")
    if not after:
        _check_tensor_names(folder, tensors, state)
    make_repairs_(network, repairs)
    _split_(network, after)
    tensors = named_tensors(network)
    _check_tensor_names(folder, tensors, state)
    check_shapes(folder, plan, {n: before.get(n, tuple(t.shape)) for n, t in tensors.items()}, state)
    check_told(folder, network, told, {n: tuple(t.shape) for n, t in state.items()})
    check_kinds(folder, tensors, state)
    check_finite(folder, state, _names(data, "not_finite"), {n for n, _ in network.named_parameters()})
    return tensors, warning


def _split_(network: nn.Module, ranks: dict[str, int]) -> None:
    """Layers of low rank where the folder has them (in place); none with more weights than the layer can need."""
    modules = dict(network.named_modules())
    for name, rank in ranks.items():
        weight = getattr(modules.get(name), "weight", None)
        most = len(weight) // getattr(modules[name], "groups", 1) if isinstance(weight, Tensor) else 0
        if type(rank) is int and most and rank > most:
            raise PlanError(f"{_PLAN}: damaged, {name!r} cannot have rank {rank}: it has {most} outputs.")
    split_layers_(network, ranks)


def _names(data: dict[str, Any], key: str) -> list[str] | None:
    found = data.get(key)
    if found is not None and not (isinstance(found, list) and all(isinstance(name, str) for name in found)):
        raise PlanError(f"{_PLAN}: damaged, {key} is no list of names.")
    return found


def _read_splits(data: dict[str, Any], key: str) -> dict[str, int]:
    """Layers of low rank that a folder names; none in folders of before there were any."""
    found = data.get(key, {})
    if not isinstance(found, dict):
        raise PlanError(f"{_PLAN}: damaged, {key} is no table of ranks.")
    return found


def _build_from(factory: Callable[[], nn.Module]) -> nn.Module:
    if not callable(factory):
        raise ModelError(f"load: expected a network, its class or a factory of it, got a {type(factory).__name__}.")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ModelError(
            f"load: {getattr(factory, '__name__', factory)!r} cannot be called without arguments ({error}); "
            "give a factory, lambda: Net(...), or an instance of the original network."
        ) from error
    except ValueError:  # written in C, it does not tell what it takes
        pass
    network = factory()
    if not isinstance(network, nn.Module):
        raise PlanError(f"load: expected a network or a factory of one, got a factory of {type(network).__name__}.")
    return network


def read_document(folder: Path) -> dict[str, Any]:
    path = folder / _PLAN
    if not path.is_file():
        raise FolderError(f"{folder}: expected a folder saved by intrafusion, but it has no {_PLAN}.")
    try:
        data = parse_json(path.read_bytes())
    except ValueError as error:
        raise FolderError(f"{path}: damaged, not JSON ({error}).") from error
    if not isinstance(data, dict) or data.get("kind") != _KIND:
        raise FolderError(f"{path}: this is not a plan of intrafusion; expected a folder that Compressed.save wrote.")
    return data


def _weights_path(folder: Path, name: Any) -> Path:
    """A weight file, which must lie in the folder itself."""
    if not isinstance(name, str):
        raise FolderError(f"{folder / _PLAN}: names no weight file; this is a plan alone, load it with Plan.")
    if PurePosixPath(name).name != name or "\\" in name or "\0" in name or name in ("", ".", ".."):
        raise FolderError(f"{folder / _PLAN}: its weight file {name!r} points outside the folder; refused.")
    path = folder / name
    if path.is_symlink() and Path(os.path.realpath(path)).parent != folder.resolve():
        raise FolderError(f"{path}: is a link out of the folder; refused.")
    return path


def _check_tensor_names(folder: Path, tensors: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    missing, extra = sorted(set(tensors) - set(state)), sorted(set(state) - set(tensors))
    if missing or extra:
        raise PlanError(
            f"{folder}: its weights are for another network; "
            f"missing {missing[:3] or 'none'}, unexpected {extra[:3] or 'none'}."
        )


def _read_repairs(data: dict[str, Any], network: nn.Module) -> tuple[Repair, ...]:
    """Attributes to set, checked: only sizes, only where the module has the size of before, and none that grows."""
    modules, repairs, entries = dict(network.named_modules()), [], data.get("repairs", [])
    if not isinstance(entries, list):
        raise PlanError(f"{_PLAN}: damaged, repairs is no list.")
    for entry in entries:
        try:
            repair = Repair(entry["module"], entry["attribute"], _as_size(entry["old"]), _as_size(entry["new"]))
            present = _read_present(modules[repair.module], repair.attribute)
        except (KeyError, TypeError) as error:
            raise PlanError(f"{_PLAN}: damaged, {entry!r} is no repair of this network.") from error
        if not _is_size(present) or not _is_size(repair.new) or present != repair.old:
            raise PlanError(
                f"{_PLAN}: {repair.module}.{repair.attribute} is no size of this network, or not {repair.old}; "
                "it was made from another network."
            )
        if not _shrinks(present, repair.new) and not _makes_up(repair, entries):
            raise PlanError(
                f"{_PLAN}: damaged, {repair.module}.{repair.attribute} would become {repair.new} from {present}; "
                "a plan only makes sizes smaller."
            )
        repairs.append(repair)
    return tuple(repairs)


def _read_present(module: nn.Module, attribute: str) -> Any:
    """A size as a network has it: an attribute, or a number inside one."""
    if "." in attribute:
        return find_numbers(module).get(attribute)
    return getattr(module, attribute, None)


def _shrinks(old: Any, new: Any) -> bool:
    """Whether every number stays or becomes smaller, but not below 1."""
    old, new = (value if isinstance(value, tuple) else (value,) for value in (old, new))
    return len(old) == len(new) and all(b == a or 1 <= b < a for a, b in zip(old, new, strict=True))


def _makes_up(repair: Repair, entries: list[Any]) -> bool:
    """Whether a number grows as another one in the module shrinks, as queries for each of fewer keys."""
    old, new = repair.old, repair.new
    inside = [e for e in entries if e is not None and f"{e['module']}.".startswith(f"{repair.module}.")]
    pairs = [(e["old"], e["new"]) for e in inside if type(e["old"]) is type(e["new"]) is int]
    return isinstance(old, int) and isinstance(new, int) and 0 < old < new and any(a * old == b * new for a, b in pairs)


def _as_size(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_size(value: Any) -> bool:
    return type(value) is int or (isinstance(value, tuple) and all(type(v) is int for v in value))


@checked
def save_plan(plan: Plan, folder: str | os.PathLike[str]) -> None:
    """Write a plan with its maps, to be carried out later with `intrafusion.apply`.

    Raises:
        FolderError: the folder exists and is not one of ours, or cannot be written.
    """
    tensors = {
        f"{field.name}/{name}": detach_dense(name, tensor)
        for name, m in plan.maps.items()
        for field in fields(m)
        if (tensor := getattr(m, field.name)) is not None
    }
    with atomic_folder(folder, ours=is_ours, names=_OURS, yours=is_users_card) as target:
        save_file(tensors, target / _MAPS_FILE)
        (target / _PLAN).write_text(_build_document(plan, {KEY: {_MAPS_FILE: digest_file(target / _MAPS_FILE)}}))
        (target / _RECIPE).write_text(plan.recipe.to_yaml())


@checked
def load_plan(folder: str | os.PathLike[str]) -> Plan:
    """Read what `save_plan` wrote.

    Raises:
        FolderError: not one of our folders, damaged, or one without maps.
        PlanError: maps that are not those of the plan.
    """
    folder = Path(folder)
    data, tensors, digests = read_whole(folder, _read_plan)
    plan = Plan.from_json(json.dumps(data), _gather_maps(folder / _MAPS_FILE, tensors))
    check_maps(plan)
    check_digests(folder, data, digests)
    return plan


def _read_plan(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """plan.json, the tensors of the maps, and checksums of both."""
    data = read_document(folder)
    path = folder / _MAPS_FILE
    if not path.is_file():
        raise FolderError(f"{folder}: has no {_MAPS_FILE}; it holds a network (intrafusion.load), not a plan to apply.")
    return data, read_tensors(path), {_MAPS_FILE: digest_file(path), _PLAN: digest_document(data)}


def _gather_maps(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, ReductionMap]:
    """Maps by group name, of tensors by "kind/name", where the kinds are the fields of a map."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        parts[name][kind] = tensor
    try:
        return {name: ReductionMap(**kinds) for name, kinds in parts.items()}
    except TypeError as error:  # a kind that is missing, or that there is not
        raise PlanError(f"{path}: damaged, these make no maps ({error}); fetch or save the folder again.") from error
