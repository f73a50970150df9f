"""Change a network, or leave it exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_TABLES = ("_parameters", "_buffers", "_modules")


@contextmanager
def untouched_on_error(network: nn.Module) -> Iterator[None]:
    """If the block raises, modules, attributes, tensors and gradients are again what they were.

    Tensors may get other memory inside the block, but must not be written in theirs.
    """
    modules = [(m, dict(m.__dict__), {key: dict(m.__dict__[key]) for key in _TABLES}) for m in network.modules()]
    tensors = [(t, t.data, t.grad) for t in (*network.parameters(), *network.buffers())]
    try:
        yield
    except BaseException:
        for module, attributes, tables in modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for key, table in tables.items():
                module.__dict__[key].clear()
                module.__dict__[key].update(table)
        for tensor, data, grad in tensors:
            tensor.data = data
            tensor.grad = grad
        raise
