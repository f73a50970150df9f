"""Recipe: what the user asked for. Frozen, printable, to and from YAML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

import yaml

from intrafusion import importance as importances
from intrafusion import reduce as reducers
from intrafusion.errors import IntrafusionError, unknown_name
from intrafusion.importance import Importance
from intrafusion.reduce import Reducer
from intrafusion.selectors import Selector, as_selectors

Keep = float | Mapping[str, float]
ORDERS = ("joint", "backward")

KINDS: tuple[tuple[str, Mapping[str, Any], Callable[[Any], Any], str], ...] = (
    ("reducer", reducers.REDUCERS, reducers.get, "pivot"),
    ("importance", importances.IMPORTANCES, importances.get, "l1"),
)
"""Kinds of methods that a recipe names: the registered ones, how one is got, the default."""


class RecipeError(IntrafusionError, ValueError):
    """A recipe that cannot be read."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, apart from the network and its example input.

    Attributes:
        keep: fraction of channels to keep, in (0, 1], for every group or by name pattern.
        reducer: how n channels become m.
        importance: how much each channel matters.
        round_to: make every size a multiple of this.
        include: reduce only these layers (None: all).
        exclude: leave these layers alone.
        target: {"params": 0.5}, {"macs": 0.5} (fractions of the original's) or {"latency_ms": 3.0}: sizes are chosen
            for it, and `keep` is not used.
        min_channels: no group becomes smaller than this.
        restore: what is done against the loss, in order: "auto", "noise", "synthetic", "images", names of restorers, or
            restorers; see `intrafusion.restore`. Empty: nothing.
        order: "joint": every group is described by the original weights; "backward": one after another from the
            output, each described by what the ones before it left, as the released code of Theus et al. does.
        seed: for whatever draws random numbers.
    """

    keep: Keep = 0.7
    reducer: Reducer = field(default_factory=lambda: reducers.get("pivot"))
    importance: Importance = field(default_factory=lambda: importances.get("l1"))
    round_to: int | None = None
    include: tuple[Selector, ...] | None = None
    exclude: tuple[Selector, ...] = ()
    target: Mapping[str, float] | None = None
    min_channels: int = 1
    restore: tuple[Any, ...] = ("auto",)
    order: str = "joint"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise RecipeError(unknown_name("order", str(self.order), ORDERS))

    @classmethod
    def of(cls, **options: Any) -> Recipe:
        """Names, and mappings of a name and hyper-parameters, become methods; single selectors become tuples."""
        for kind, known, get, default in KINDS:
            wanted = options.get(kind, default)
            options[kind] = method_from_data(wanted, known, kind) if isinstance(wanted, Mapping) else get(wanted)
        options["exclude"] = as_selectors(options.get("exclude")) or ()
        options["include"] = as_selectors(options.get("include"))
        keep = options.get("keep")
        if keep is not None and options.get("target") is not None:
            raise RecipeError("expected keep or target, got both; a target chooses the sizes itself, leave keep out.")
        keep = 0.7 if keep is None else keep
        restore = options.get("restore", "auto")
        restore = () if restore is None else tuple(restore) if isinstance(restore, (list, tuple)) else (restore,)
        options["restore"] = tuple(dict(r) if isinstance(r, Mapping) else r for r in restore)
        if options.get("target") is not None:
            options["target"] = {k: plain(v) for k, v in dict(options["target"]).items()}
        options["keep"] = {k: plain(v) for k, v in keep.items()} if isinstance(keep, Mapping) else plain(keep)
        return cls(**options)

    def to_yaml(self) -> str:
        """YAML that `from_yaml` reads back; of a method that is not ours only the name is, see `Foreign`."""
        data = {
            "keep": None if self.target else self.keep,
            "reducer": method_to_data(self.reducer, reducers.REDUCERS),
            "importance": method_to_data(self.importance, importances.IMPORTANCES),
            "round_to": self.round_to,
            "include": None if self.include is None else [str(s) for s in self.include],
            "exclude": [str(s) for s in self.exclude],
            "target": None if self.target is None else dict(self.target),
            "min_channels": self.min_channels,
            "restore": [step_to_data(step) for step in self.restore],
            "order": self.order,
            "seed": self.seed,
        }
        return yaml.safe_dump(data, sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Read a recipe.

        Raises:
            RecipeError: not YAML, or an unknown key or method.
        """
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"recipe: not YAML ({' '.join(str(error).split())}).") from error
        if not isinstance(data, dict):
            raise RecipeError(f"recipe: expected a mapping of options, got {type(data).__name__}.")
        valid = {f.name for f in fields(cls)}
        for key in data:
            if key not in valid:
                raise RecipeError(f"recipe: {unknown_name('option', str(key), valid)}")
        for kind, known, _, default in KINDS:
            data[kind] = method_from_data(data.get(kind, default), known, kind)
        return cls.of(**data)


@dataclass(frozen=True)
class Foreign:
    """The name of a method that is not ours, where a recipe was read back: it says what was done, and cannot do it."""

    foreign: str

    mixes = True  # of the class, as of every reducer

    def __call__(self, *_: Any) -> Any:
        raise RecipeError(
            f"recipe: it was made with {self.foreign}, which is not part of intrafusion; "
            "set `reducer` or `importance` to that method again."
        )


def step_to_data(step: Any) -> Any:
    """A step of `restore`: names and mappings as they are, a dataclass by its class and fields."""
    if isinstance(step, str):
        return step
    if isinstance(step, Mapping):
        return dict(step)
    if is_dataclass(step) and not isinstance(step, type):
        return {"name": type(step).__name__, **asdict(step)}
    return {"name": getattr(step, "__qualname__", type(step).__qualname__)}


def plain(value: Any) -> Any:
    """A number of NumPy or PyTorch as one of Python."""
    return value.item() if hasattr(value, "item") else value


def method_to_data(method: Any, registry: Mapping[str, Any]) -> str | dict[str, Any]:
    """A registered method by name and hyper-parameters."""
    for name, entry in registry.items():
        default = entry() if isinstance(entry, type) else entry
        if method == default:
            return name
    for name, entry in registry.items():
        default = entry() if isinstance(entry, type) else entry
        if type(method) is type(default) and is_dataclass(method) and not isinstance(method, type):
            return {"name": name, **asdict(method)}
    if isinstance(method, Foreign):
        return asdict(method)
    named = method if hasattr(method, "__qualname__") else type(method)
    return {"foreign": repr(method) if is_dataclass(method) else f"{named.__module__}.{named.__qualname__}"}


def method_from_data(data: Any, registry: Mapping[str, Any], kind: str) -> Any:
    if not isinstance(data, (str, Mapping)):
        raise RecipeError(f"recipe: {kind}: expected a name or a mapping with a name, got {type(data).__name__}.")
    if isinstance(data, Mapping) and data.keys() == {"foreign"}:
        return Foreign(str(data["foreign"]))
    options = {"name": data} if isinstance(data, str) else dict(data)
    name = str(options.pop("name", None))
    if name not in registry:
        raise RecipeError(f"recipe: {unknown_name(kind, name, registry)}")
    entry = registry[name]
    default = entry() if isinstance(entry, type) else entry
    try:
        return replace(default, **options) if options else default
    except TypeError as error:
        raise RecipeError(f"recipe: {kind} {name!r} does not take these options: {error}.") from error
