"""What runs an update: this process alone, or Hugging Face Accelerate. The only import of Accelerate."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from intrafusion.errors import IntrafusionError


def find_accelerator(precision: str) -> Any:
    """Accelerate where it has something to do, in half precision or under a launcher; else a stand-in without it.

    Raises:
        IntrafusionError: Accelerate is needed and not installed.
    """
    if precision == "no" and not _is_launched():
        return _Alone()
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise IntrafusionError(
            f"train: precision {precision!r} and several processes need Accelerate: pip install 'intrafusion[train]'."
        ) from error
    AcceleratorState._reset_state()  # it keeps the precision of an earlier training in global state
    return Accelerator(mixed_precision=precision)


def _is_launched() -> bool:
    """Whether `accelerate launch`, torchrun or one like them started this process."""
    return any(name in ("LOCAL_RANK", "WORLD_SIZE") or name.startswith("ACCELERATE_") for name in os.environ)


class _Alone:
    """What Accelerate does for one process in full precision, to the bit: nothing."""

    num_processes, process_index, is_main_process = 1, 0, True

    def prepare_optimizer(self, optimizer: Optimizer) -> Optimizer:
        return optimizer

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: list[nn.Parameter], largest: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, largest)
