"""One way to say a method: by its name, by a mapping of its name and hyper-parameters, or as an object.

Reducers, importance criteria and restorers each have a `Registry`, which lies in the folder that holds them and is
imported when it is asked for: a recipe reads all three, and stands below the restorers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from importlib import import_module
from typing import Any, Self, get_type_hints

from intrafusion.arguments import find_fault, plain, takes
from intrafusion.brief import show_briefly
from intrafusion.errors import RecipeError, show, unknown_name


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
        takes: with how many arguments it is called.
        traits: what its methods say of themselves.
        words: what a recipe may say instead of a method; it stays the word.
        adopt: makes an object of somebody else a method, or gives it back.
    """

    kind: str
    methods: Mapping[str, Any]
    expected: str
    takes: int
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
        if not self.can_call(found) or not self.traits.are_told_by(found):
            expected = f"a name, a mapping with a name or {self.expected}"
            names = ", ".join(dict.fromkeys((*words, *self.methods)))
            raise RecipeError(f"{self.kind}: expected {expected}, got {show(wanted)}; names are {names}.")
        return found

    def can_call(self, method: Any) -> bool:
        """Whether it is called as a method of this kind is."""
        return callable(method) and not isinstance(method, type) and takes(method, (None,) * self.takes)

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
            raise RecipeError(f'{self.kind}: expected a mapping such as {{"name": ...}}, got {show(dict(wanted))}.')
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
        hints = get_type_hints(type(method), include_extras=True)
        for option, value in values.items():
            fault = find_fault(value, hints.get(option, Any))
            if fault is not None:
                path, expected, got = fault
                raise RecipeError(f"{self.kind} {name!r}: {option}{path}: expected {expected}, got {show(got)}.")


# ---- all kinds ------------------------------------------------------------------------------------------------------

_FOLDERS = {"reducer": "reduce", "importance": "importance", "restorer": "restore"}


def registry_of(kind: str) -> Registry:
    """The registry of "reducer", "importance" or "restorer", which the folder of that kind holds."""
    return import_module(f"intrafusion.{_FOLDERS[kind]}").REGISTRY
