"""How many ranks does each layer keep? One rule per class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from intrafusion.arguments import Fraction, checked
from intrafusion.errors import ArgumentError, BudgetError, unknown_name
from intrafusion.factorize.svd import Spectrum


@runtime_checkable
class RankRule(Protocol):
    """(layers) -> rank by name; layers that are left out, or get a rank that saves nothing, stay as they are."""

    def __call__(self, layers: Sequence[Spectrum], /) -> dict[str, int]: ...


@checked
@dataclass(frozen=True)
class Share:
    """Every layer keeps the same fraction of its parameters."""

    fraction: Fraction = 0.5

    @checked
    def __call__(self, layers: Sequence[Spectrum]) -> dict[str, int]:
        return {x.name: max(1, min(x.full, int(self.fraction * x.dense / x.step))) for x in layers}


@checked
@dataclass(frozen=True)
class Global:
    """The singular values of all layers with the largest sigma^2 / (d + c_out), until the budget is used up.

    `fraction`: of the parameters of all layers that can be split. Every layer keeps at least rank 1.
    Reference: Runkel et al. 2025.
    """

    fraction: Fraction = 0.5

    @checked
    def __call__(self, layers: Sequence[Spectrum]) -> dict[str, int]:
        """Ranks with as many parameters as the budget allows.

        Raises:
            BudgetError: rank 1 everywhere is more than the budget.
        """
        budget = self.fraction * sum(x.dense for x in layers)
        ranks = {x.name: 1 for x in layers}
        total = sum(x.cost(1) for x in layers)
        if total > budget:
            raise BudgetError(
                f"factorize: rank 1 in every layer takes {total:,} parameters, more than the budget of {int(budget):,}"
                "; give a larger fraction, or exclude layers."
            )
        gains = [(float(x.energy[k]) / x.step, -k, x) for x in layers for k in range(1, x.full)]
        for _, _, layer in sorted(gains, key=lambda gain: gain[:2], reverse=True):
            more = layer.cost(ranks[layer.name] + 1) - layer.cost(ranks[layer.name])
            if total + more > budget:
                break
            ranks[layer.name] += 1
            total += more
        return ranks


@checked
@dataclass(frozen=True)
class Energy:
    """Every layer keeps the least rank that holds this fraction of its squared singular values."""

    threshold: Fraction = 0.9

    @checked
    def __call__(self, layers: Sequence[Spectrum]) -> dict[str, int]:
        return {x.name: _least_rank(x, self.threshold) for x in layers}


def _least_rank(layer: Spectrum, threshold: float) -> int:
    held = layer.energy.cumsum(0)
    enough = held >= threshold * held[-1] * (1 - 1e-12)  # all of it is reached in spite of rounding
    return 1 + int(enough.double().argmax())


RULES: dict[str, Callable[[], RankRule]] = {"share": Share, "global": Global, "energy": Energy}


def get_rule(rule: str | RankRule) -> RankRule:
    """The rule of this name with its default; a rule passes through.

    Raises:
        ArgumentError: unknown name.
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise ArgumentError(unknown_name("rank rule", rule, RULES))
        return RULES[rule]()
    return rule
