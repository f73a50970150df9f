"""The laws that every importance, reducer and restorer is held to, run on one of them: ours or a third party's."""

from intrafusion.checks.importance import check_importance
from intrafusion.checks.laws import LAWS, LawError
from intrafusion.checks.reducer import check_reducer
from intrafusion.checks.restorer import check_restorer

__all__ = ["LAWS", "LawError", "check_importance", "check_reducer", "check_restorer"]
