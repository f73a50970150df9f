"""Plan: what will be done to each group. Inert: it can be printed, saved, loaded and compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from intrafusion.arguments import checked
from intrafusion.brief import show_briefly
from intrafusion.documents import parse_json
from intrafusion.errors import PlanError
from intrafusion.graph import ChannelGraph, ChannelGroup, layers_of, sort_by_role
from intrafusion.measure.comparison import describe_change
from intrafusion.measure.size import Size
from intrafusion.names import name_some
from intrafusion.recipe import Recipe
from intrafusion.reduce import ReductionMap
from intrafusion.table import GroupLine, TextTable, tabulate_groups

_FORMAT = 2
_PLAIN = 1  # the format of plans that split no layer, which older versions read too
MISSED = "target missed: "
"""How a warning begins that sizes are not what was asked for."""
FACTORISED = "factorised"
"""How the channels between the two halves of a layer that is split become fewer."""
_HEADER = ("group", "channels", "how", "other layers, or reason")
T = TypeVar("T")


@checked
@dataclass(frozen=True)
class Decision:
    """One group: n channels become m, or the reason why they do not.

    Attributes:
        members: tensors that run through the group, as "name[dimension] role".
        mixing: "mixed" (new channels may combine old ones), "selected", or "selected: " and why they must not be mixed.
        family: twins share this number, and their size or the share of it that they keep.
        depth: index counted from the output, None where the group cannot be reduced.
        kind: "channel", or "block" where whole blocks are meant, such as heads; see `ChannelGroup.kind`.
        proof: once it is carried out, "function" where the smaller network gave what the original gives without the
            removed channels, "symmetry" where there is no such original, as where a norm sees the channels together.
    """

    group: str
    n: int
    m: int
    members: tuple[str, ...]
    mixing: str
    reason: str | None = None
    family: int = 0
    depth: int | None = None
    kind: str = "channel"
    proof: str | None = field(default=None, compare=False)  # no part of what was decided

    __repr__ = show_briefly

    @property
    def reduced(self) -> bool:
        return self.reason is None and self.m < self.n


def at_sizes(recipe: Recipe, decisions: Iterable[Decision]) -> Recipe:
    """The recipe with the sizes that were decided, in place of what chose them."""
    keep = {d.group: d.m / d.n for d in decisions}
    return replace(recipe, keep=keep, target=None, round_to=None, min_channels=1)


@checked
@dataclass(frozen=True, eq=False)
class Plan:
    """Decisions for every group of one network, and the map of each group that is reduced.

    Attributes:
        recipe: what was asked for.
        decisions: in execution order, the groups left alone included.
        shapes: shape of every tensor of the network that the plan was made for.
        maps: ReductionMap by group name.
        warnings: what the tracer could not see.
        fixed: what is in no group, in words.
        split: layers that become two, by name, and their full rank: `shapes`, and the groups, are of the network in
            which they are two of that rank, which give the same.
    """

    recipe: Recipe
    decisions: tuple[Decision, ...]
    shapes: Mapping[str, tuple[int, ...]]
    maps: Mapping[str, ReductionMap] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    split: Mapping[str, int] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        told = lambda p: (p.recipe.to_yaml(), p.decisions, dict(p.shapes), p.warnings, p.fixed, dict(p.split))  # noqa: E731
        return (
            told(self) == told(other)
            and self.maps.keys() == other.maps.keys()
            and all(_is_same_map(self.maps[k], other.maps[k]) for k in self.maps)
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def sizes(self) -> dict[str, int]:
        return {d.group: d.m for d in self.decisions if d.reduced}

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every layer that becomes two."""
        return {name: self.sizes.get(name_rank_group(name), full) for name, full in self.split.items()}

    @checked
    def rolled_back(self, reasons: Mapping[str, str]) -> Plan:
        """The same plan in which these groups are left alone."""
        decisions = tuple(
            replace(d, m=d.n, reason=reasons[d.group]) if d.group in reasons else d for d in self.decisions
        )
        return replace(self, decisions=decisions, maps={k: v for k, v in self.maps.items() if k not in reasons})

    @checked
    def proved(
        self,
        maps: Mapping[str, ReductionMap],
        proofs: Mapping[str, str],
        unmixed: Mapping[str, str] = MappingProxyType({}),
    ) -> Plan:
        """The same plan with the maps as they were carried out, and how each group was proved.

        Args:
            unmixed: why groups were selected in the end.
        """
        how = {name: f"selected: {why}" for name, why in unmixed.items()}
        told = (replace(d, proof=proofs.get(d.group), mixing=how.get(d.group, d.mixing)) for d in self.decisions)
        return replace(self, decisions=tuple(told), maps=dict(maps))

    @checked
    def check_fits(self, shapes: Mapping[str, tuple[int, ...]], graph: ChannelGraph | None = None) -> None:
        """Raise PlanError, with the first difference, unless the plan was made for such a network."""
        for name, shape in self.shapes.items():
            if name not in shapes:
                raise PlanError(
                    f"the plan is for another network: it has {name!r} {list(shape)}, this one has no such tensor."
                )
            if tuple(shapes[name]) != tuple(shape):
                raise PlanError(
                    f"the plan is for another network: {name!r} is {list(shape)} there and {list(shapes[name])} here."
                )
        extra = sorted(set(shapes) - set(self.shapes))
        if extra:
            raise PlanError(f"the plan is for another network: this one has {extra[0]!r}, the plan does not know it.")
        if graph is not None:
            self._check_groups({g.name: g for g in graph.groups})

    def _check_groups(self, groups: Mapping[str, ChannelGroup]) -> None:
        for decision in self.decisions:
            if decision.reduced:
                group = groups.get(decision.group)
                if group is None or describe_members(group) != decision.members or group.size != decision.n:
                    raise PlanError(f"the plan is for another network: group {decision.group!r} is not the same here.")

    def __str__(self) -> str:
        return str(tabulate_plan(self))

    def __repr__(self) -> str:
        return f"Plan({len(self.sizes)} of {len(self.decisions)} groups are reduced; print it to see them)"

    def _repr_html_(self) -> str:
        return tabulate_plan(self).to_html()

    def to_json(self) -> str:
        """All but the maps."""
        data = {
            "format": _FORMAT if self.split else _PLAIN,
            "recipe": self.recipe.to_yaml(),
            "decisions": [asdict(d) for d in self.decisions],
            "shapes": {k: list(v) for k, v in self.shapes.items()},
            "warnings": list(self.warnings),
            "fixed": list(self.fixed),
            **({"split": dict(self.split)} if self.split else {}),
        }
        return json.dumps(data, indent=1)

    @classmethod
    @checked
    def from_json(cls, text: str, maps: Mapping[str, ReductionMap] | None = None) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            PlanError: not a plan, or one of a later format.
        """
        try:
            data: dict[str, Any] = parse_json(text)
            _check_format(data["format"])
            decisions = tuple(_read_decision(entry) for entry in data["decisions"])
            shapes = {_as(str, k): tuple(_count(n) for n in v) for k, v in data["shapes"].items()}
            recipe = Recipe.from_yaml(_as(str, data["recipe"]))
            warnings = tuple(_as(str, warning) for warning in data["warnings"])
            fixed = tuple(_as(str, line) for line in data.get("fixed", ()))  # older plans do not say
            split = {_as(str, name): _count(rank) for name, rank in data.get("split", {}).items()}
            return cls(recipe, decisions, shapes, dict(maps or {}), warnings, fixed, split)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PlanError(f"this is not a plan of intrafusion ({type(error).__name__}: {error}).") from error


# ---- as a table -----------------------------------------------------------------------------------------------------


def tabulate_plan(
    plan: Plan, before: Size | None = None, after: Size | None = None, below: Iterable[str] = ()
) -> TextTable:
    """Every group with what becomes of it, the sizes of the network if they are given, and notes."""
    sizes = (
        ()
        if before is None or after is None
        else (
            f"{size_change('parameters', before.params, after.params)}; {size_change('MACs', before.macs, after.macs)}",
        )
    )
    notes = (f"{'warning' if is_miss(w) else 'note'}: {w}" for w in (*plan.warnings, *_list_proofs(plan)))
    fixed = (f"in no group, {line}" for line in plan.fixed)
    lines = [_name_layers(_describe_decision(decision), plan.split) for decision in plan.decisions]
    return tabulate_groups(_HEADER, lines, (*sizes, *fixed, *notes, *below))


def is_miss(warning: str) -> bool:
    """Whether it says that the sizes are not what was asked for."""
    return warning.startswith(MISSED)


def size_change(label: str, before: int, after: int) -> str:
    return f"{label} {describe_change(before, after) if before else format(before, ',')}"


def _describe_decision(decision: Decision) -> GroupLine:
    if not decision.reduced:
        return GroupLine(decision.group, str(decision.n), "kept", why=decision.reason or "all kept")
    how, _, why = decision.mixing.partition(": ")
    arrow = " -> rank " if how == FACTORISED else " -> "
    size = f"{decision.n}{arrow}{decision.m}" + ("" if decision.kind == "channel" else " blocks")
    return GroupLine(decision.group, size, how, list_layers(decision), f"not mixed: {why}" if why else "")


def _name_layers(line: GroupLine, split: Mapping[str, int]) -> GroupLine:
    """With the layers that become two called as the one that each pair was."""
    halves = {f"{name}.{half}": name for name in split for half in ("reduce", "expand")}
    layers = dict.fromkeys(halves.get(name, name) for name in line.layers)
    name, mark, number = line.name.partition("#")
    return replace(line, name=f"{halves.get(name, name)}{mark}{number}", layers=tuple(layers))


def name_rank_group(layer: str) -> str:
    """The group of the channels between the two halves of a layer."""
    return f"{layer}.reduce"


def list_layers(decision: Decision) -> tuple[str, ...]:
    """The layers that a group runs through, by name."""
    return layers_of(member.partition("[")[0] for member in decision.members)


def _list_proofs(plan: Plan) -> list[str]:
    """What is not proved of the function of reduced groups."""
    names = [d.group for d in plan.decisions if d.reduced and d.proof == "symmetry"]
    if not names:
        return []
    count = "1 group is" if len(names) == 1 else f"{len(names)} groups are"
    return [f"{count} proved by symmetry only, as something looks at all their channels: {name_some(names)}"]


# ---- checks and reading ---------------------------------------------------------------------------------------------


def check_maps(plan: Plan) -> None:
    """Raise PlanError unless every reduced group has a map of its size, and no other has one."""
    reduced = {d.group: d for d in plan.decisions if d.reduced}
    if reduced.keys() != plan.maps.keys():
        group = min(reduced.keys() ^ plan.maps.keys())
        raise PlanError(f"the plan and its maps differ: {group!r} is in one of them only; fetch or save them again.")
    for name, reduction in plan.maps.items():
        n, m = reduced[name].n, reduced[name].m
        shapes = {"merge": (m, n), "unmerge": (n, m), "shift": (n,), "scale": (2,)}
        for kind, tensor in vars(reduction).items():
            shape = shapes[kind]
            if tensor is not None and not _is_map(tensor, shape):
                raise PlanError(
                    f"{name}: expected a {kind} of finite float64 {list(shape)}, got {tensor.dtype} "
                    f"{list(tensor.shape)}; the maps are damaged, fetch or save them again."
                )


def _is_map(tensor: torch.Tensor, shape: tuple[int, ...]) -> bool:
    return tensor.dtype == torch.float64 and tuple(tensor.shape) == shape and bool(torch.isfinite(tensor).all())


def _check_format(number: Any) -> None:
    if _count(number) > _FORMAT:
        raise PlanError(f"the plan has format {number}, this version reads up to {_FORMAT}; upgrade intrafusion.")


def _read_decision(data: Mapping[str, Any]) -> Decision:
    """Raises TypeError or ValueError for what is no decision."""
    entries: dict[str, Any] = {**data, "members": tuple(_as(str, member) for member in data["members"])}
    decision = Decision(**entries)
    for text in (decision.group, decision.mixing, decision.reason or "", decision.proof or "", decision.kind):
        _as(str, text)
    for number in (decision.family, decision.depth or 0, decision.n, decision.m):
        _count(number)
    if not min(1, decision.n) <= decision.m <= decision.n:
        raise ValueError(f"{decision.group}: {decision.n} channels cannot become {decision.m}")
    return decision


def _as(kind: type[T], value: Any) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"expected a {kind.__name__}, got {value!r}")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a whole number, got {value!r}")
    return value


def _is_same_map(a: ReductionMap, b: ReductionMap) -> bool:
    pairs = ((getattr(a, f.name), getattr(b, f.name)) for f in fields(ReductionMap))
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in pairs)


def describe_members(group: ChannelGroup) -> tuple[str, ...]:
    """Members as text, producers first."""
    return tuple(map(str, sort_by_role(group.members)))
