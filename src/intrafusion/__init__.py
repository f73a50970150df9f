"""intrafusion: make a trained neural network smaller without retraining it, and prove each step."""

from intrafusion.compressed import Compressed
from intrafusion.errors import BudgetError, FolderError, IntrafusionError, ModelError, PlanError
from intrafusion.fusion import Alignment, Fused, fuse
from intrafusion.graph import ChannelGraph, ChannelGroup, Member, Role
from intrafusion.io.folder import load
from intrafusion.iterate import compress_in_steps
from intrafusion.pipeline import apply, carry_out, compress, decide, follow, inspect
from intrafusion.plan import Decision, Plan
from intrafusion.recipe import Recipe
from intrafusion.reduce import Fold, IntraFusion, Pivot, Select
from intrafusion.selectors import inputs_of, outputs_of
from intrafusion.trace import trace

__version__ = "0.1.0"

__all__ = [
    "Alignment",
    "BudgetError",
    "ChannelGraph",
    "ChannelGroup",
    "Compressed",
    "Decision",
    "Fold",
    "FolderError",
    "Fused",
    "IntraFusion",
    "IntrafusionError",
    "Member",
    "ModelError",
    "Pivot",
    "Plan",
    "PlanError",
    "Recipe",
    "Role",
    "Select",
    "apply",
    "carry_out",
    "compress",
    "compress_in_steps",
    "decide",
    "follow",
    "fuse",
    "inputs_of",
    "inspect",
    "load",
    "outputs_of",
    "trace",
]
