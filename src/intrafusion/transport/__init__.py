"""Optimal transport as arithmetic: costs, marginals and exact plans. Knows no networks."""

from __future__ import annotations

from intrafusion.transport.cost import direction_cost, unit_rows
from intrafusion.transport.marginals import MARGINALS, marginal
from intrafusion.transport.solve import optimal_coupling

__all__ = ["MARGINALS", "direction_cost", "marginal", "optimal_coupling", "unit_rows"]
