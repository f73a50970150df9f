"""The networks a command line can name: a factory in a module or a file, or a model of the zoo, torchvision or timm."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.documents import parse_yaml
from intrafusion.errors import IntrafusionError, ModelError, unknown_name
from intrafusion.io.line import import_from_file, import_of
from intrafusion.network.provenance import set_source_
from intrafusion.network.sources import find_timm, find_torchvision, find_zoo, list_classifiers

FORMS = "module:factory, path.py:factory, zoo:NAME, torchvision:NAME or timm:NAME"


class NetworkKind(StrEnum):
    """Where a named network comes from."""

    MODULE = "module"
    FILE = "file"
    ZOO = "zoo"
    TORCHVISION = "torchvision"
    TIMM = "timm"


@dataclass(frozen=True)
class ModelSpec:
    """A network that a command line named, not built yet.

    Attributes:
        kind: where it comes from.
        target: its name there; for a module or a file, `module:factory` or `path.py:factory`.
        args: keyword arguments of the factory.
        trained: whether a network of the zoo gets its trained weights, unless `args` say `pretrained`.
    """

    kind: NetworkKind
    target: str
    args: Mapping[str, Any] = field(default_factory=dict)
    trained: bool = True

    def __str__(self) -> str:
        return self.target if self.kind in (NetworkKind.MODULE, NetworkKind.FILE) else f"{self.kind}:{self.target}"

    def build(self) -> nn.Module:
        """A new network. The folder of a user's module or file is put on `sys.path`, as `python` does for its script.

        Raises:
            ModelError: it cannot be found or its factory fails; says which step, and what to do.
        """
        model = _BUILDERS[self.kind](self)
        named = self.kind not in (NetworkKind.MODULE, NetworkKind.FILE)
        return set_source_(model, self.kind, self.target, self.args) if named else model

    def python(self) -> tuple[str, str]:
        """Import statements, and the expression behind them that `intrafusion.load` takes as the original network."""
        place, _, factory = self.target.rpartition(":")
        options = [f"{key}={value!r}" for key, value in self.args.items()]
        named = ", ".join([repr(self.target), *options])
        match self.kind:
            case NetworkKind.ZOO:
                return "from intrafusion.lab import zoo", f"zoo.build({named})"
            case NetworkKind.TORCHVISION:
                return "from torchvision.models import get_model", f"get_model({named})"
            case NetworkKind.TIMM:
                return "import timm", f"timm.create_model({named})"
            case NetworkKind.MODULE:
                found = import_of(place, factory) or f"from {place} import {factory.partition('.')[0]}"
            case NetworkKind.FILE:
                found = import_from_file(Path(place), factory)
        return found, f"{factory}({', '.join(options)})" if options else factory

    def example_input(self) -> Tensor | None:
        """An input the network accepts, the same at each call; None where only the network's author knows one."""
        if self.kind is NetworkKind.ZOO:
            return find_zoo(self.target).example_input(self.target)
        if self.kind is NetworkKind.TIMM:
            return _noise(find_timm(self.target).get_pretrained_cfg(self.target).input_size)
        if self.kind is NetworkKind.TORCHVISION and self.target in list_classifiers(find_torchvision(self.target)):
            return _noise((3, 224, 224))
        return None


def resolve(name: str, arguments: Iterable[str] = (), *, trained: bool = True) -> ModelSpec:
    """Read the name of a network and the `key=value` arguments of its factory.

    Args:
        trained: whether a network of the zoo gets its trained weights, unless the arguments say `pretrained`.

    Raises:
        ModelError: the name has none of the known forms, or an argument is malformed.
    """
    args = parse_arguments(arguments)
    kind, _, target = name.partition(":")
    if kind in (NetworkKind.ZOO, NetworkKind.TORCHVISION, NetworkKind.TIMM):
        return ModelSpec(NetworkKind(kind), target, args, trained)
    place, _, factory = name.rpartition(":")
    if not (place and factory):
        raise ModelError(f"cannot tell which network {name!r} is; expected {FORMS}.")
    return ModelSpec(NetworkKind.FILE if place.endswith(".py") else NetworkKind.MODULE, name, args)


def parse_arguments(arguments: Iterable[str]) -> dict[str, Any]:
    """Keyword arguments from `key=value` texts, the values read as YAML: 3, 1e-3, true, null, text, [1, 2].

    Raises:
        ModelError: there is no `=`, the key is no Python name or stands twice, or the value is not YAML.
    """
    parsed: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key.isidentifier():
            raise ModelError(f"--arg {argument!r}: expected key=value, with a Python name as key.")
        if key in parsed:
            raise ModelError(f"--arg {argument!r}: {key!r} is given twice.")
        parsed[key] = _yaml_value(argument, text)
    return parsed


def _yaml_value(argument: str, text: str) -> Any:
    if re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", text):  # 1e-3 is a number to everyone but YAML 1.1
        return float(text)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ModelError(f"--arg {argument!r}: the value is not YAML ({error}); put text in quotes.") from error


def _build_from_module(spec: ModelSpec) -> nn.Module:
    name, _, attribute = spec.target.rpartition(":")
    _search_first(Path.cwd())
    with _blaming(spec, f"importing {name!r}"):
        module = _import(name)
    return _call(spec, _attribute(spec, module, attribute))


def _build_from_file(spec: ModelSpec) -> nn.Module:
    name, _, attribute = spec.target.rpartition(":")
    path = Path(name).resolve()
    if not path.is_file():
        raise ModelError(f"{spec}: there is no file {path}; check the path.")
    _search_first(path.parent)
    with _blaming(spec, f"running {path.name}"):
        module = _run_file(path)
    return _call(spec, _attribute(spec, module, attribute))


def _build_from_zoo(spec: ModelSpec) -> nn.Module:
    zoo = find_zoo(spec.target)
    options = {"pretrained": spec.trained, **spec.args}
    if options["pretrained"] and spec.target not in zoo.names(trained=True):
        raise ModelError(
            f"{spec} has no trained weights; give some with --weights, or --arg pretrained=false for random ones."
        )
    return _call(spec, lambda **_: zoo.build(spec.target, **options))


def _build_from_torchvision(spec: ModelSpec) -> nn.Module:
    models = find_torchvision(spec.target)
    return _call(spec, lambda **args: models.get_model(spec.target, **args))


def _build_from_timm(spec: ModelSpec) -> nn.Module:
    timm = find_timm(spec.target)
    return _call(spec, lambda **args: timm.create_model(spec.target, **args))


_BUILDERS: dict[NetworkKind, Callable[[ModelSpec], nn.Module]] = {
    NetworkKind.MODULE: _build_from_module,
    NetworkKind.FILE: _build_from_file,
    NetworkKind.ZOO: _build_from_zoo,
    NetworkKind.TORCHVISION: _build_from_torchvision,
    NetworkKind.TIMM: _build_from_timm,
}


def _noise(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


def _search_first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, something it imports is not
        raise ModelError(
            f"there is no module {error.name!r}; install it, start in the folder that holds it, "
            "or name a file as path.py:factory."
        ) from error


def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_intrafusion_model_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not Python source")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look themselves up there
    spec.loader.exec_module(module)
    return module


def _attribute(spec: ModelSpec, module: ModuleType, dotted: str) -> Any:
    found: Any = module
    for name in dotted.split("."):
        if not hasattr(found, name):
            public = [other for other in dir(found) if not other.startswith("_")]
            raise ModelError(f"{spec}: {unknown_name('attribute', name, public)}")
        found = getattr(found, name)
    return found


def _call(spec: ModelSpec, factory: Any) -> nn.Module:
    """The network that a function, a class or a ready instance gives."""
    if isinstance(factory, nn.Module):
        if spec.args:
            raise ModelError(f"{spec} is a network already and takes no --arg; got {', '.join(spec.args)}.")
        return copy.deepcopy(factory)
    if not callable(factory):
        raise ModelError(f"{spec}: expected a function, a class or a network, got a {type(factory).__name__}.")
    with _blaming(spec, "calling it"):
        model = factory(**spec.args)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec}: expected it to return a torch.nn.Module, got a {type(model).__name__}.")
    return model


@contextmanager
def _blaming(spec: ModelSpec, step: str) -> Iterator[None]:
    """Turn whatever the user's code raises into an error that says whose it is."""
    try:
        yield
    except IntrafusionError:  # says all that is needed
        raise
    except (Exception, SystemExit) as error:  # a script that ends itself on import is no network
        wants_arguments = isinstance(error, TypeError) and "argument" in str(error)
        hint = "; pass its arguments as --arg key=value" if wants_arguments else ""
        raise ModelError(f"{spec}: {step} raised {type(error).__name__}: {error}{hint}.") from error
