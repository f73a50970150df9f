"""Heads that query heads share: where they lie, and how several become one."""

from intrafusion.heads.merging import merge_inspected

__all__ = ["merge_inspected"]
