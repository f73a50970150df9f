"""Operations without a rule: whatever they touch is blocked, with the operation's and the module's name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from intrafusion.trace.info import Info

if TYPE_CHECKING:
    from intrafusion.trace.tracer import Call, Tracer


def refuse(t: Tracer, call: Call, why: str = "operation without a rule") -> list[Info | None]:
    for tensor in call.tensors:
        t.forbid(t.info(tensor), f"{why}: {call.where}")
    return [t.fixed(o.shape) if isinstance(o, Tensor) else None for o in call.outputs]
