"""factorize(): convolutions and linear layers of a network replaced by two thinner ones each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from intrafusion.application import apply
from intrafusion.arguments import check_argument, checked
from intrafusion.brief import show_briefly
from intrafusion.compressed import Compressed
from intrafusion.errors import ModelError
from intrafusion.factorize.ranks import RankRule, get_rule
from intrafusion.factorize.svd import Spectrum, factorize_layer, spectrum
from intrafusion.inspection import check_weights
from intrafusion.measure.size import size_of
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.tensors import copy_model
from intrafusion.network.wrappers import outside_inference, unwrap
from intrafusion.plan import Plan
from intrafusion.recipe import Recipe
from intrafusion.selectors import as_selectors, find_meant
from intrafusion.surgery.lowrank import explain_unreadable, replace_module_
from intrafusion.table import TextTable
from intrafusion.trace import trace


@checked
@dataclass(frozen=True, eq=False)
class Factorized(Compressed):
    """The factorised network.

    Attributes:
        ranks: (rank, rank before) of every layer that was replaced, by name.
    """

    ranks: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    __repr__ = show_briefly

    def _headline(self) -> str:
        groups = f"; {super()._headline()}" if self.plan.sizes else ""
        return f"{_count_layers(len(self.ranks))} of low rank, in two thinner parts each{groups}"

    def _tables(self) -> tuple[TextTable, ...]:
        """The ranks, and the channel groups where some are smaller."""
        rows = tuple((name, str(full), str(rank)) for name, (rank, full) in self.ranks.items())
        ranks = TextTable(("layer", "full rank", "rank"), rows)
        return (ranks, *super()._tables()) if self.plan.sizes else (ranks,)


def _count_layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count or 'no'} layers"


@checked
@outside_inference
def factorize(
    model: nn.Module | Compressed,
    example_inputs: ExampleInputs,
    ranks: str | RankRule | Mapping[str, int] = "global",
    *,
    include: Any = None,
    exclude: Any = None,
) -> Factorized:
    """Replace convolutions and linear layers by two thinner layers, along their largest singular values; no data.

    A layer is replaced only where that saves parameters. Layers whose weights are tied, reparametrised or read by other
    code than their own stay as they are. The result can be compressed further, also channel by channel.

    Args:
        model: a network, not modified, or what `compress` returned, to keep one plan for both steps.
        example_inputs: of one forward call.
        ranks: "share", "global", "energy", a rule such as `Energy(0.95)`, or ranks by name of the layer.
        include: replace only these layers: names, patterns, types or functions as for `compress`; None for all.
        exclude: leave these layers alone.
    Raises:
        ModelError: no layer can be split, the network holds NaN, or does not run.
        BudgetError: a budget that rank 1 everywhere exceeds, or a name that nothing matches.
    """
    inputs = Inputs.of(example_inputs)
    base = model if isinstance(model, Compressed) else _wrap_unreduced(unwrap(model), inputs)
    check_weights(base.model)
    layers = spectra(base.model, include, exclude)
    small = copy_model(base.model)
    wanted = ranks if isinstance(ranks, Mapping) else get_rule(ranks)(layers)
    check_argument(wanted, Mapping[str, int], "factorize: ranks", factorize)
    _check_layer_names(wanted, layers)
    chosen = {x.name: wanted[x.name] for x in layers if 1 <= wanted.get(x.name, 0) <= x.largest}
    for name, rank in chosen.items():
        replace_module_(small, name, factorize_layer(small.get_submodule(name), rank))
    found = {f.name: getattr(base, f.name) for f in fields(Compressed)}
    full = {x.name: x.full for x in layers}
    after = size_of(small, inputs)
    found |= {"model": small, "after": after, "comparison": None}  # which was with the network before
    return Factorized(**found, ranks={n: (r, full[n]) for n, r in chosen.items()})


def _wrap_unreduced(model: nn.Module, inputs: Inputs) -> Compressed:
    """A copy of a network in which nothing is reduced."""
    graph = trace(model, inputs)
    return apply(model, Plan(Recipe.of(keep=1.0), (), graph.shapes, {}, graph.warnings), inputs, graph=graph)


@checked
def spectra(model: nn.Module, include: Any = None, exclude: Any = None) -> list[Spectrum]:
    """Singular values of every layer that can be split, in the order of the modules.

    Raises:
        ModelError: there is none.
    """
    meant = find_meant(model, as_selectors(include), as_selectors(exclude) or ())
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found = []
    for name, module in model.named_modules():
        if name in meant and explain_unreadable(model, name, module, owners) is None:
            found.append(spectrum(name, module))
    if not found:
        raise ModelError(
            "factorize: there is no convolution or linear layer with a weight of its own to split; look at include=."
        )
    return found


def _check_layer_names(wanted: Mapping[str, int], layers: list[Spectrum]) -> None:
    unknown = sorted(set(wanted) - {x.name for x in layers})
    if unknown:
        raise ModelError(f"factorize: {unknown[0]!r} is no layer that can be split; see `spectra(model)` for those.")
