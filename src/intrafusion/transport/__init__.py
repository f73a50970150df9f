"""Optimal transport as arithmetic: costs, marginals and plans. Knows no networks."""

from __future__ import annotations

from intrafusion.transport.cost import cosine_cost, direction_cost, unit_rows
from intrafusion.transport.marginals import MARGINALS, marginal
from intrafusion.transport.solve import entropic_coupling, optimal_coupling

__all__ = [
    "MARGINALS",
    "cosine_cost",
    "direction_cost",
    "entropic_coupling",
    "marginal",
    "optimal_coupling",
    "unit_rows",
]
