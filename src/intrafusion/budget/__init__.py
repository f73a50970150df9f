"""How many channels does each group keep?"""

from intrafusion.budget.uniform import uniform_sizes

__all__ = ["uniform_sizes"]
