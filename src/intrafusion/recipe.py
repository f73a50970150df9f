"""Recipe: what the user asked for. Frozen, printable, to and from YAML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import yaml

from intrafusion import importance as importances
from intrafusion import reduce as reducers
from intrafusion.arguments import Seed, checked, plain
from intrafusion.asked import check_count, check_keep, check_target
from intrafusion.brief import show_briefly
from intrafusion.documents import parse_yaml
from intrafusion.errors import RecipeError, show, unknown_name
from intrafusion.importance import Importance
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.reduce import Reducer, ReducerTraits
from intrafusion.registry import Foreign, Registry, registry_of
from intrafusion.selectors import Selector, as_selectors

Keep = float | Mapping[str, float]
Ranks = bool | float | str
ONLY = "only"
"""Of ranks: no group of channels becomes smaller."""
ORDERS = ("joint", "backward", "forward")


class _Unshared(yaml.SafeDumper):
    """Writes equal parts out each time: no anchors in a file that people read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


@partial(checked, leaving=("keep", "target", "round_to", "min_channels", "order", "merge_heads", "ranks"))
@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, apart from the network and its example input.

    Attributes:
        keep: fraction of channels to keep, in (0, 1], for every group or by name pattern.
        reducer: how n channels become m.
        importance: how much each channel matters.
        round_to: make every size a multiple of this; None: as `keep` gives them, with a target see `budget.rounding`.
        include: reduce only these layers (None: all).
        exclude: leave these layers alone.
        target: limits such as {"params": 0.5, "macs": 0.5} (fractions of the original's), {"latency_ms": 3.0} or
            {"memory_mb": 20}: sizes are chosen for them, and `keep` is not used.
        min_channels: no group becomes smaller than this.
        restore: what is done against the loss, in order: "auto", "noise", "synthetic", "images", "mirrored",
            names of restorers, or restorers; see `intrafusion.restore`. Empty: nothing.
        order: "joint": every group is described by the original weights; "backward": one after another from the
            output, each described by what the ones before it left, as the released code of Theus et al. does;
            "forward": in turns from the input, each as it is read where the ones before are fewer and solved.
        seed: for whatever draws random numbers.
        uniform: only sizes that the configuration of a network of transformers can say, so that `from_pretrained`
            opens what `save_pretrained` writes: what one number there sets becomes one size.
        outputs: names or indices of those outputs of the network that matter; None: all.
        untie: give heads that share the weight of an embedding one of their own first.
        merge_heads: key/value heads that are left where several query heads share one; then nothing else is cut.
        ranks: whether layers may become two thinner ones: True, a target chooses between fewer channels and lower
            ranks; "only", it lowers ranks alone; or the fraction of its weights that each layer keeps, beside `keep`.
    """

    keep: Keep = 0.7
    reducer: Reducer = field(default_factory=lambda: reducers.get_reducer("pivot"))
    importance: Importance = field(default_factory=lambda: importances.get_importance("l2"))
    round_to: int | None = None
    include: tuple[Selector, ...] | None = None
    exclude: tuple[Selector, ...] = ()
    target: Mapping[str, float] | None = None
    min_channels: int = 1
    restore: tuple[Any, ...] = ("auto",)
    order: str = "joint"
    seed: Seed = 0
    uniform: bool = False
    outputs: tuple[str | int, ...] | None = None
    untie: bool = False
    merge_heads: int | None = None
    ranks: Ranks = False

    __repr__ = show_briefly

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_count(self.min_channels, "min_channels")
        if self.round_to is not None:
            check_count(self.round_to, "round_to")
        if self.target is not None:
            check_target(self.target)
        _check_levels(self.levels)
        if self.merge_heads is not None:
            _check_alone(self)
        _check_ranks(self)
        if not isinstance(self.order, str) or self.order not in ORDERS:
            raise RecipeError(unknown_name("order", self.order, ORDERS))

    @property
    def levels(self) -> tuple[str, ...]:
        """The steps of `restore` that say on what the layers are solved."""
        return tuple(step for step in self.restore if isinstance(step, str))

    @property
    def needs_moments(self) -> bool:
        """Whether sizes or channels are chosen by what is read of the channels."""
        return self.target is not None or self.ranks is not False or ReducerTraits.of(self.reducer).needs_moments

    @property
    def rank_share(self) -> float | None:
        """The fraction of its weights that every layer keeps by its rank; None where a target chooses, or nothing."""
        return None if isinstance(self.ranks, (bool, str)) else float(self.ranks)

    def call_of(self, example_inputs: ExampleInputs) -> Inputs:
        """The example inputs as a call, of which the outputs that matter are looked at."""
        example = Inputs.of(example_inputs)
        return example if self.outputs is None else replace(example, outputs=self.outputs)

    def refuse_foreign(self) -> None:
        """Raise RecipeError if a method was only named where this was read back, see `Foreign`."""
        for method in (self.reducer, self.importance, *self.restore):
            if isinstance(method, Foreign):
                method()

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """The names of all options."""
        return tuple(f.name for f in fields(cls))

    @classmethod
    def of(cls, **options: Any) -> Recipe:
        """The recipe of these options as `compress` takes them: names become methods, one selector a tuple of one.

        Raises:
            RecipeError: an unknown option, or a method, hyper-parameter or value that means nothing.
            BudgetError: sizes that are no sizes, or selectors that are none.
        """
        for name in options:
            if name not in cls.options():
                raise RecipeError(unknown_name("option", name, cls.options()))
        if options.get("keep") is not None and options.get("target") is not None:
            raise RecipeError("expected keep or target, got both; a target chooses the sizes itself, leave keep out.")
        if options.get("merge_heads") is not None:
            sizes = [name for name in ("keep", "target") if options.get(name) is not None]
            if sizes:
                raise RecipeError(f"merge_heads: goes without {sizes[0]}; merge first, and compress what comes out.")
            options["keep"] = 1.0
        if options.get("keep") is None and not isinstance(options.get("ranks", False), (bool, str)):
            options["keep"] = 1.0
        return cls(**{name: _read(name, value) for name, value in options.items() if _is_said(name, value)})

    def to_yaml(self) -> str:
        """YAML that `from_yaml` reads back; of a method that is not ours only the name is, see `Foreign`."""
        data = {name: _to_text(name, getattr(self, name)) for name in self.options()}
        if self.target is not None or self.merge_heads is not None:
            data["keep"] = None
        return yaml.dump(data, Dumper=_Unshared, sort_keys=False)

    @classmethod
    @checked
    def from_yaml(cls, text: str) -> Recipe:
        """Read a recipe.

        Raises:
            RecipeError: not YAML, or an unknown option or method.
            BudgetError: sizes that are no sizes, or selectors that are none.
        """
        try:
            data = parse_yaml(text)
        except ValueError as error:
            raise RecipeError(f"recipe: not YAML ({error}).") from error
        if not isinstance(data, dict):
            raise RecipeError(f"recipe: expected a mapping of options, got {type(data).__name__}.")
        if isinstance(data.get("restore"), list):
            data["restore"] = [_foreign_step(step) for step in data["restore"]]
        try:
            return cls.of(**{str(name): value for name, value in data.items()})
        except RecipeError as error:
            raise RecipeError(f"recipe: {error}") from error


def _check_alone(recipe: Recipe) -> None:
    """
    Raises:
        BudgetError: no number of heads.
        RecipeError: options that merging heads does not take.
    """
    check_count(recipe.merge_heads, "merge_heads")
    taken = ("keep", "merge_heads", "seed", "outputs", "uniform")
    plain_recipe = Recipe()
    beside = [n for n in Recipe.options() if n not in taken and getattr(recipe, n) != getattr(plain_recipe, n)]
    if beside:
        raise RecipeError(f"merge_heads: goes without {', '.join(beside)}; merge first, and compress what comes out.")


def _check_ranks(recipe: Recipe) -> None:
    """
    Raises:
        RecipeError: no word and no fraction, without a target where that is needed, or beside what does not go with it.
    """
    ranks, aimed = recipe.ranks, recipe.target is not None
    chosen = ranks is True or (isinstance(ranks, str) and ranks == ONLY)
    share = type(ranks) is float and 0 < ranks < 1
    if ranks is not False and not chosen and not share:
        raise RecipeError(
            f"ranks: expected True or {ONLY!r} beside a target, or a fraction in (0, 1), got {show(ranks)}; 0.5 leaves "
            "each layer half of its weights."
        )
    if chosen and not aimed:
        raise RecipeError(f"ranks: {show(ranks)} lets a target choose; give target=, or a fraction, such as ranks=0.5.")
    if share and aimed:
        raise RecipeError(f"ranks: a target chooses ranks itself, got {show(ranks)} beside it; give ranks=True.")
    if ranks is not False and recipe.order == "forward":
        raise RecipeError("ranks: goes without order='forward', which chooses channels only; leave one out.")
    if ranks is not False and recipe.uniform:
        raise RecipeError("ranks: goes without uniform: no configuration says that a layer is two; leave one out.")


# ---- what a caller says -> what a recipe holds -> what YAML holds ----------------------------------------------------


def _is_said(name: str, value: Any) -> bool:
    """Whether an option is more than its default; where None is no value of its own, it means the default."""
    return value is not None or name not in ("keep", "exclude")


def _read(name: str, value: Any) -> Any:
    """An option as a recipe holds it."""
    return _READERS.get(name, plain)(value)


def _steps(restore: Any) -> tuple[Any, ...]:
    """The steps against the loss: words such as "auto" as they are, the others as restorers."""
    steps = list(restore) if isinstance(restore, (list, tuple)) else [restore]
    if len(steps) == 1 and (steps[0] is None or (isinstance(steps[0], str) and steps[0] == "none")):
        return ()
    registry = registry_of("restorer")
    found = tuple(registry.resolve(step, words=(*registry.words, "none")) for step in steps)
    if "none" in found:
        raise RecipeError(f"restore: 'none' stands alone, got {show(steps)}; leave it or the other steps out.")
    return found if not found or isinstance(found[0], str) else (*_list_before(found[0], registry), *found)


def _list_before(restorer: Any, registry: Registry) -> tuple[Any, ...]:
    """What goes before a restorer that would be the first step; see `RestorerTraits`."""
    word = getattr(registry.traits.of(restorer), "follows", None)
    return () if word is None else (registry.resolve(word, words=registry.words),)


def _outputs(value: Any) -> tuple[str | int, ...] | None:
    """One or several names or indices."""
    if value is None:
        return None
    listed = list(value) if isinstance(value, (list, tuple)) else [value]
    names = tuple(int(item) if isinstance(item, str) and item.isdigit() else plain(item) for item in listed)
    if not names or not all(isinstance(n, str) or type(n) is int for n in names):
        raise RecipeError(
            f"outputs: expected names or indices of what the network returns, got {show(value)}; such as 'logits' or 0."
        )
    return names


def _check_levels(levels: tuple[str, ...]) -> None:
    words = registry_of("restorer").words
    if len(levels) > 1:
        raise RecipeError(
            f"restore: expected at most one of {', '.join(words)}, got {show(levels)}; leave the others out."
        )
    for level in levels:
        if level not in words:
            raise RecipeError(f"restore: expected {', '.join(words)} or restorers, got {show(level)}; use Recipe.of.")


def _plain_values(value: Any) -> Any:
    return {key: plain(item) for key, item in value.items()} if isinstance(value, Mapping) else plain(value)


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "keep": _plain_values,
    "target": _plain_values,
    "reducer": reducers.get_reducer,
    "importance": importances.get_importance,
    "restore": _steps,
    "include": as_selectors,
    "exclude": as_selectors,
    "outputs": _outputs,
}
"""Options that are more than a number or a name: what is made of what a caller says."""


def _to_text(name: str, value: Any) -> Any:
    """An option as YAML holds it."""
    if name in ("reducer", "importance"):
        return registry_of(name).to_data(value)
    if name == "restore":
        return [registry_of("restorer").to_data(step) for step in value]
    if name in ("include", "exclude"):
        return None if value is None else [str(selector) for selector in value]
    if name == "outputs":
        return None if value is None else list(value)
    return dict(value) if isinstance(value, Mapping) else value


def _foreign_step(step: Any) -> Any:
    """Version 0.1 wrote the restorer of a user like one of ours, by the name of its class."""
    name = step.get("name") if isinstance(step, Mapping) else None
    is_theirs = isinstance(name, str) and name[:1].isupper() and not registry_of("restorer").knows(name)
    return {"foreign": name} if is_theirs else step
