"""Key/value heads that several query heads share become fewer: alike ones are merged, not dropped."""

from intrafusion.merge.networks import Merged, merge_heads

__all__ = ["Merged", "merge_heads"]
