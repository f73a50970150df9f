"""Operations without a rule: whatever they touch is blocked, with the operation's and the module's name."""

from __future__ import annotations

from torch import Tensor

from intrafusion.names import advise_to_fold
from intrafusion.trace.call import Call
from intrafusion.trace.info import Info, LabelledTensor
from intrafusion.trace.ledger import Ledger

READS = ("_local_scalar_dense", "is_nonzero", "equal")  # float(x), x.item(), if x: ..., x.equal(y)


def refuse(ledger: Ledger, call: Call, why: str = "operation without a rule") -> list[Info | None]:
    for tensor in call.tensors:
        ledger.forbid(ledger.look_up(tensor), f"{why}: {call.where}{advise_to_fold(call.where)}")
    return [LabelledTensor.fixed(o.shape) if isinstance(o, Tensor) else None for o in call.outputs]
