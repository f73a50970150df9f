"""The networks a command line can name: a factory in a module or file, or one that has a name in zoo or package."""

from __future__ import annotations

import ast
import copy
import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.cli import hugging_face
from intrafusion.documents import parse_yaml
from intrafusion.errors import IntrafusionError, ModelError, unknown_name
from intrafusion.io.line import import_from_file, import_of
from intrafusion.names import name_some
from intrafusion.network.provenance import set_source_
from intrafusion.network.sources import (
    MISFIT,
    find_timm,
    find_torchvision,
    find_zoo,
    import_torchvision,
    list_classifiers,
)

FILE_PREFIX = "_intrafusion_model_"
"""Of the names of modules that were run from a file."""
FORMS = "module:factory, path.py:factory, zoo:NAME, torchvision:NAME, timm:NAME or hf:NAME_OR_FOLDER"


class NetworkKind(StrEnum):
    """Where a named network comes from."""

    MODULE = "module"
    FILE = "file"
    ZOO = "zoo"
    TORCHVISION = "torchvision"
    TIMM = "timm"
    HF = "hf"

    @property
    def named(self) -> bool:
        """Whether networks have a name there, behind the kind and a colon."""
        return self not in (NetworkKind.MODULE, NetworkKind.FILE)


@dataclass(frozen=True)
class ModelSpec:
    """A network that a command line named, not built yet.

    Attributes:
        kind: where it comes from.
        target: its name there; for a module or a file, `module:factory` or `path.py:factory`.
        args: keyword arguments of the factory.
        trained: whether a network of the zoo or of transformers gets its trained weights, unless `args` say
            `pretrained`.
    """

    kind: NetworkKind
    target: str
    args: Mapping[str, Any] = field(default_factory=dict)
    trained: bool = True

    def __str__(self) -> str:
        return f"{self.kind}:{self.target}" if self.kind.named else self.target

    def build(self) -> nn.Module:
        """A new network. The folder of a user's module or file is put on `sys.path`, as `python` does for its script.

        Raises:
            ModelError: it cannot be found or its factory fails; says which step, and what to do.
        """
        model = _call(self)
        return set_source_(model, self.kind, self.target, self.args) if self.kind.named else model

    @cached_property
    def factory(self) -> Any:
        """What gives the network: found, not called yet.

        Raises:
            ModelError: there is no such file, module, class or name; says which, and what to do.
        """
        return _FINDERS[self.kind](self)

    def check(self) -> None:
        """Raise ModelError, as `build` would, for a name that leads nowhere; the network is not built."""
        found = self.factory
        if not isinstance(found, nn.Module) and not callable(found):
            raise ModelError(f"{self}: expected a function, a class or a network, got a {type(found).__name__}.")

    def doubt_weights(self, model: nn.Module) -> str | None:
        """Why the weights of a network that was built, with none loaded on top, are not trained ones, if that is known.

        A class or a function of the user's is called once more: what it draws at random is not the same twice.
        """
        if self.kind.named:
            asked, how = self._asks_for_weights()
            return None if asked else f"{self} has random weights: {how}, --weights FILE loads your own."
        if isinstance(self.factory, nn.Module):
            return None
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(_OTHER_SEED)
                again = dict(self.build().named_parameters())
        except ModelError:  # it is built only once
            return None
        drawn = [n for n, p in model.named_parameters() if n in again and not _is_same(p, again[n])]
        if not drawn:
            return None
        count = f"{len(drawn)} of {len(again)} parameters are random ({name_some(drawn)})"
        return f"{self}: {count}: others each time it is built; --weights FILE loads trained ones."

    def _asks_for_weights(self) -> tuple[bool, str]:
        """Whether a network that has a name is one with trained weights, and what would ask for them."""
        match self.kind:
            case NetworkKind.TORCHVISION:
                return bool(self.args.get("weights")), "--arg weights=DEFAULT fetches trained ones"
            case NetworkKind.TIMM:
                return bool(self.args.get("pretrained")), "--arg pretrained=true fetches trained ones"
            case NetworkKind.ZOO if self.target not in find_zoo(self.target).names(trained=True):
                return False, "the zoo has no trained ones of it"
            case _:
                return bool(
                    self.args.get("pretrained", self.trained)
                ), "without --arg pretrained=false it has trained ones"

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
            case NetworkKind.HF:
                return "import transformers", hugging_face.python_expression(self.target, self.args)
            case NetworkKind.MODULE:
                found = import_of(place, factory) or f"from {place} import {factory.partition('.')[0]}"
            case NetworkKind.FILE:
                found = import_from_file(Path(place), factory)
        return found, f"{factory}({', '.join(options)})" if options else factory

    def example_input(self) -> Tensor | dict[str, Tensor] | None:
        """An input the network accepts, the same at each call; None where only the network's author knows one."""
        if self.kind is NetworkKind.ZOO:
            return find_zoo(self.target).example_input(self.target)
        if self.kind is NetworkKind.TIMM:
            return _example_of_timm(self.target, self.args)
        if self.kind is NetworkKind.HF:
            return hugging_face.example_from_config(self.target, self.args)
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
    if kind in _NAMED and target:
        return ModelSpec(NetworkKind(kind), target, args, trained)
    place, _, factory = name.rpartition(":")
    if not (place and factory) or not (place.endswith(".py") or _is_module_name(place)):
        hint = _suggest(name) or _suggest_inside(Path(name))
        missing = "" if ":" in name or Path(name).exists() else ", and there is no such folder"
        raise ModelError(f"cannot tell which network {name!r} is{missing}; expected {FORMS}.{hint}")
    if kind == place and (hint := _suggest(name)) and not _is_found(place):
        raise ModelError(f"there is no module {place!r}.{hint} Expected {FORMS}.")
    return ModelSpec(NetworkKind.FILE if place.endswith(".py") else NetworkKind.MODULE, name, args)


def read_function(name: str, option: str) -> Callable[[nn.Module], Any]:
    """A user's function of a network, such as its accuracy, named as `module:function` or `path.py:function`.

    Raises:
        ModelError: it cannot be found or is none; when it is called, whatever goes wrong in it.
    """
    kind, _, target = name.partition(":")
    if kind in _NAMED or not target:
        raise ModelError(f"{option} {name}: expected a function of a network as path.py:function or module:function.")
    found = resolve(name).factory
    if not callable(found) or isinstance(found, (type, nn.Module)):
        raise ModelError(f"{option} {name}: expected a function of a network, got a {type(found).__name__}; name one.")

    def call(model: nn.Module) -> Any:
        try:
            return found(model)
        except IntrafusionError:  # says all that is needed
            raise
        except Exception as error:
            raise ModelError(
                f"{option} {name}: raised {type(error).__name__}: {error}; it is called with a network alone."
            ) from error

    return call


def list_names(place: str) -> list[str]:
    """The names of the networks at a place such as "zoo"; none where they have none, or its package is missing."""
    try:
        match place:
            case NetworkKind.ZOO:
                return list(importlib.import_module("intrafusion.lab.zoo").names())
            case NetworkKind.TORCHVISION:
                return import_torchvision().models.list_models()
            case NetworkKind.TIMM:
                import_torchvision()
                return importlib.import_module("timm").list_models()
    except (ImportError, RuntimeError, ModelError):
        pass
    return []


def _suggest_inside(path: Path) -> str:
    """What a file of Python, named without a class, defines; it is read, not run."""
    if path.suffix != ".py" or not path.is_file():
        return ""
    try:
        body = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError, OSError):
        return ""
    kinds = (ast.ClassDef, ast.FunctionDef)
    found = [f"{path}:{n.name}" for kind in kinds for n in body if isinstance(n, kind) and n.name[0] != "_"]
    return f" Did you mean {' or '.join(map(repr, found[-_SHOWN:]))}?" if found else ""


def _is_module_name(place: str) -> bool:
    return all(part.isidentifier() for part in place.split("."))


def _is_found(module: str) -> bool:
    return (Path.cwd() / module).exists() or importlib.util.find_spec(module) is not None


def _suggest(name: str) -> str:
    """The place that was meant by a slip of the pen, or left out."""
    kind, _, target = name.partition(":")
    near = difflib.get_close_matches(kind, _NAMED, n=1) if target else []
    found = [f"{near[0]}:{target}"] if near else [f"{k}:{name}" for k in _NAMED if name in list_names(k)]
    return f" Did you mean {' or '.join(map(repr, found))}?" if found else ""


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


_NAMED = tuple(kind.value for kind in NetworkKind if kind.named)


def _find_in_module(spec: ModelSpec) -> Any:
    name, _, attribute = spec.target.rpartition(":")
    _search_first(Path.cwd())
    with _blaming(spec, f"importing {name!r}"):
        module = _import(name)
    return _attribute(spec, module, attribute)


def _find_in_file(spec: ModelSpec) -> Any:
    name, _, attribute = spec.target.rpartition(":")
    path = Path(name).resolve()
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "check the path."
        raise ModelError(f"{spec}: there is no file {path}; {hint}")
    _search_first(path.parent)
    with _blaming(spec, f"running {path.name}"):
        module = _run_file(path)
    return _attribute(spec, module, attribute)


def _find_in_zoo(spec: ModelSpec) -> Any:
    zoo = find_zoo(spec.target)
    options = {"pretrained": spec.trained, **spec.args}
    if options["pretrained"] and spec.target not in zoo.names(trained=True):
        raise ModelError(
            f"{spec} has no trained weights; give some with --weights, or --arg pretrained=false for random ones."
        )
    return lambda **_: zoo.build(spec.target, **options)


def _find_in_torchvision(spec: ModelSpec) -> Any:
    return partial(find_torchvision(spec.target).get_model, spec.target)


def _find_in_timm(spec: ModelSpec) -> Any:
    return partial(find_timm(spec.target).create_model, spec.target)


def _find_in_hf(spec: ModelSpec) -> Any:
    args = dict(spec.args)
    trained = bool(args.pop("pretrained", spec.trained))
    return lambda **_: hugging_face.build_from_folder(spec.target, trained=trained, args=args)


_FINDERS: dict[NetworkKind, Callable[[ModelSpec], Any]] = {
    NetworkKind.MODULE: _find_in_module,
    NetworkKind.FILE: _find_in_file,
    NetworkKind.ZOO: _find_in_zoo,
    NetworkKind.TORCHVISION: _find_in_torchvision,
    NetworkKind.TIMM: _find_in_timm,
    NetworkKind.HF: _find_in_hf,
}
_OTHER_SEED, _SHOWN = 20_231_117, 5


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _example_of_timm(name: str, args: Mapping[str, Any]) -> Tensor | None:
    config = find_timm(name).get_pretrained_cfg(name)
    if config is None:
        return None
    channels, height, width = config.input_size
    size = args.get("img_size", (height, width))
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return _noise((args.get("in_chans", channels), height, width))


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
        near = difflib.get_close_matches(name, [*_NAMED, *(p.stem for p in Path.cwd().glob("*.py"))], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ModelError(
            f"there is no module {error.name!r}; install it, start in the folder that holds it, "
            f"or name a file as path.py:factory.{hint}"
        ) from error


def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{FILE_PREFIX}{path.stem}", path)
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


def _call(spec: ModelSpec) -> nn.Module:
    """The network that a function, a class or a ready instance gives."""
    factory = spec.factory
    if isinstance(factory, nn.Module):
        if spec.args:
            raise ModelError(f"{spec} is a network already and takes no --arg; got {', '.join(spec.args)}.")
        return copy.deepcopy(factory)
    spec.check()
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
        if "torchvision::" in str(error):
            hint = f"; {MISFIT}"
        raise ModelError(f"{spec}: {step} raised {type(error).__name__}: {error}{hint}.") from error
