"""Modes that see every operation of a forward pass."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Mode(TorchDispatchMode):
    """A mode of which each step is plain Python.

    By default PyTorch wraps each step of a mode so that `torch.compile` leaves it alone. That imports the compiler,
    which takes longer than most networks take to trace, and costs more than the step; nothing is compiled under ours.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
