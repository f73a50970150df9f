"""Key/value heads that several query heads share become fewer: alike ones are merged, not dropped."""

from intrafusion.merge.networks import merge_heads

__all__ = ["merge_heads"]
