"""One way to say a method: by its name, by a mapping of its name and hyper-parameters, or as an object.

Reducers, importance criteria and restorers each have a `Registry`, which is filed under its kind by the folder that
holds them: a recipe reads all three, and stands below the restorers.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

from intrafusion.brief import show_briefly
from intrafusion.errors import RecipeError, unknown_name

_KINDS: dict[type, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", lambda v: isinstance(v, bool)),
    int: ("a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool)),
    float: ("a number", lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)),
    str: ("a name", lambda v: isinstance(v, str)),
    type(None): ("None", lambda v: v is None),
}
"""Types of hyper-parameters: how a message calls them, and what is one. Values of other types are not looked at."""


@dataclass(frozen=True)
class Traits:
    """What a method may say of itself, beside what it does. The fields of a subclass are the names of attributes.

    A field with a default is optional, so that a plain function or an object of somebody else can be a method.
    """

    @classmethod
    def of(cls, method: object) -> Self:
        """What this method says, and the default where it says nothing."""
        return cls(**{f.name: getattr(method, f.name) for f in fields(cls) if hasattr(method, f.name)})

    @classmethod
    def are_told_by(cls, method: object) -> bool:
        """Whether a method says what it has to: True or False for every field that has no default."""
        required = (f.name for f in fields(cls) if f.default is MISSING)
        return all(isinstance(getattr(method, name, None), bool) for name in required)


@dataclass(frozen=True)
class Foreign:
    """The name of a method that is not ours, where a recipe was read back: it says what was done, and cannot do it."""

    foreign: str

    __repr__ = show_briefly

    mixes = True  # of the class, as of every reducer
    needs_data = False  # and of every restorer

    def __call__(self, *_: Any) -> Any:
        raise RecipeError(
            f"recipe: it was made with {self.foreign}, which is not part of intrafusion; "
            "set that option of the recipe to the method again."
        )


@dataclass(frozen=True)
class Registry:
    """The methods of one kind.

    Attributes:
        kind: as messages call it.
        methods: by name: a class, whose hyper-parameters are the fields of the dataclass, or an object of it.
        expected: what else can be given, for messages.
        traits: what its methods say of themselves.
        words: what a recipe may say instead of a method; it stays the word.
        adopt: makes an object of somebody else a method, or gives it back.
    """

    kind: str
    methods: Mapping[str, Any]
    expected: str
    traits: type[Traits]
    words: tuple[str, ...] = ()
    adopt: Callable[[Any], Any] = lambda found: found

    __repr__ = show_briefly

    def resolve(self, wanted: Any, *, words: Iterable[str] = ()) -> Any:
        """The method that is wanted, with default hyper-parameters where it is a name; a method passes through.

        Args:
            wanted: a name, {"name": name, hyper-parameter: value, ...}, or a method.
            words: also valid; they are given back.
        Raises:
            RecipeError: an unknown name or hyper-parameter, a value of the wrong kind, or no method.
        """
        if isinstance(wanted, str):
            return wanted if wanted in words else self._named(wanted, {}, words)
        if isinstance(wanted, Mapping):
            return self._from_mapping(wanted, words)
        found = self.adopt(wanted)
        if isinstance(found, type) or not callable(found) or not self.traits.are_told_by(found):
            expected = f"a name, a mapping with a name or {self.expected}"
            raise RecipeError(f"{self.kind}: expected {expected}, got {wanted!r}.")
        if type(found) in {type(self._default(name)) for name in self.methods}:
            self._check_values(type(found).__name__, found, vars(found))
        return found

    def to_data(self, method: Any) -> str | dict[str, Any]:
        """What `resolve` makes the same method of; of a method that is not ours only the name, see `Foreign`."""
        if isinstance(method, str):
            return method
        for name in self.methods:
            if method == self._default(name):
                return {"name": name} if name in self.words else name
        for name in self.methods:
            if type(method) is type(self._default(name)):
                return {"name": name, **{key: plain(value) for key, value in asdict(method).items()}}
        if isinstance(method, Foreign):
            return asdict(method)
        named = method if hasattr(method, "__qualname__") else type(method)
        return {"foreign": repr(method) if is_dataclass(method) else f"{named.__module__}.{named.__qualname__}"}

    def knows(self, name: str) -> bool:
        return name in self.methods or name in self._classes

    @property
    def _classes(self) -> dict[str, str]:
        """Names by class: so recipes of version 0.1 call restorers."""
        return {type(self._default(name)).__name__: name for name in reversed([*self.methods])}

    def _default(self, name: str) -> Any:
        entry = self.methods[name]
        return entry() if isinstance(entry, type) else entry

    def _from_mapping(self, wanted: Mapping[str, Any], words: Iterable[str]) -> Any:
        if wanted.keys() == {"foreign"}:
            return Foreign(str(wanted["foreign"]))
        options = {str(key): plain(value) for key, value in wanted.items()}
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise RecipeError(f'{self.kind}: expected a mapping such as {{"name": ...}}, got {dict(wanted)!r}.')
        if name in words and not self.knows(name):
            if options:
                raise RecipeError(f"{self.kind} {name!r}: it takes no hyper-parameters, got {', '.join(options)}.")
            return name
        return self._named(name, options, words)

    def _named(self, name: str, options: Mapping[str, Any], words: Iterable[str]) -> Any:
        if not self.knows(name):
            raise RecipeError(unknown_name(self.kind, name, (*words, *self.methods)))
        default = self._default(self._classes.get(name, name))
        valid = [f.name for f in fields(default) if f.init]
        for option in options:
            if option not in valid:
                raise RecipeError(f"{self.kind} {name!r}: {unknown_name('hyper-parameter', option, valid)}")
        self._check_values(name, default, options)
        try:
            return replace(default, **options) if options else default
        except (TypeError, ValueError, AttributeError) as error:
            raise RecipeError(f"{self.kind} {name!r}: {error}") from error

    def _check_values(self, name: str, method: object, values: Mapping[str, Any]) -> None:
        hints = get_type_hints(type(method))
        for option, value in values.items():
            allowed = _alternatives(hints.get(option, Any))
            if all(kind in _KINDS for kind in allowed) and not any(_KINDS[k][1](plain(value)) for k in allowed):
                shown = " or ".join(_KINDS[kind][0] for kind in allowed)
                raise RecipeError(f"{self.kind} {name!r}: {option}: expected {shown}, got {value!r}.")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def plain(value: Any) -> Any:
    """A number of NumPy or PyTorch as one of Python."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value


# ---- all kinds ------------------------------------------------------------------------------------------------------

_REGISTRIES: dict[str, Registry] = {}


def register(registry: Registry) -> Registry:
    """File a registry under its kind."""
    _REGISTRIES[registry.kind] = registry
    return registry


def registry_of(kind: str) -> Registry:
    """The registry of "reducer", "importance" or "restorer"; `import intrafusion` has filed all of them."""
    return _REGISTRIES[kind]
