"""How many channels does each group keep?"""

from intrafusion.budget.uniform import sizes

__all__ = ["sizes"]
