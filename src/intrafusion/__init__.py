"""intrafusion: make a trained neural network smaller without retraining it, and prove each step."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from intrafusion import trace
from intrafusion.application import apply
from intrafusion.compressed import Compressed
from intrafusion.errors import (
    ArgumentError,
    BudgetError,
    DivergenceError,
    FolderError,
    IntrafusionError,
    IntrafusionWarning,
    ModelError,
    PlanError,
    RecipeError,
)
from intrafusion.frontiers import Frontier, Point, frontier
from intrafusion.fusion import Alignment, Fused, fuse
from intrafusion.graph import ChannelGraph, ChannelGroup, Member, Role
from intrafusion.inspection import inspect
from intrafusion.io.export import Exported, export
from intrafusion.io.folder import load
from intrafusion.iterate import compress_in_steps
from intrafusion.large.folder import compress_folder
from intrafusion.pipeline import compress
from intrafusion.plan import Decision, Plan
from intrafusion.planning import decide
from intrafusion.recipe import Recipe
from intrafusion.reduce import Eliminate, Fold, IntraFusion, Pivot, Select
from intrafusion.selectors import inputs_of, outputs_of

if TYPE_CHECKING:
    from intrafusion import checks

__version__ = "0.2.0"

__all__ = [
    "Alignment",
    "ArgumentError",
    "BudgetError",
    "ChannelGraph",
    "ChannelGroup",
    "Compressed",
    "Decision",
    "DivergenceError",
    "Eliminate",
    "Exported",
    "Fold",
    "FolderError",
    "Frontier",
    "Fused",
    "IntraFusion",
    "IntrafusionError",
    "IntrafusionWarning",
    "Member",
    "ModelError",
    "Pivot",
    "Plan",
    "PlanError",
    "Point",
    "Recipe",
    "RecipeError",
    "Role",
    "Select",
    "apply",
    "checks",
    "compress",
    "compress_folder",
    "compress_in_steps",
    "decide",
    "export",
    "frontier",
    "fuse",
    "inputs_of",
    "inspect",
    "load",
    "outputs_of",
    "trace",
]

_LATER = ("checks", "merge")  # modules that are named in full, and imported when they first are


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return importlib.import_module(f"intrafusion.{name}")
    raise AttributeError(f"module 'intrafusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
