# The public names, for type checkers, the documentation and __init__.py: each is imported when it is first used.

from . import (
    budget,
    checks,
    errors,
    importance,
    lab,
    measure,
    merge,
    reduce,
    restore,
    trace,
    train,
)
from .application import apply
from .compressed import Compressed
from .errors import (
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
from .frontiers import Frontier, Point, frontier
from .fusion import Alignment, Fused, fuse
from .graph import ChannelGraph, ChannelGroup, Member, Role
from .inspection import inspect
from .io.export import Exported, export
from .io.folder import load
from .iterate import compress_in_steps
from .large.folder import compress_folder
from .pipeline import compress
from .plan import Decision, Plan
from .planning import decide
from .recipe import Recipe
from .reduce import Eliminate, Fold, IntraFusion, Pivot, Select
from .selectors import inputs_of, outputs_of

__version__: str

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
    "budget",
    "checks",
    "compress",
    "compress_folder",
    "compress_in_steps",
    "decide",
    "errors",
    "export",
    "frontier",
    "fuse",
    "importance",
    "inputs_of",
    "inspect",
    "lab",
    "load",
    "measure",
    "merge",
    "outputs_of",
    "reduce",
    "restore",
    "trace",
    "train",
]
