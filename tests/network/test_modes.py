"""Modes of ours cost no more than their own steps."""

from __future__ import annotations

import programs

INSPECT = """
import sys, torch, intrafusion
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
graph = intrafusion.inspect(net, torch.zeros(1, 3))
print(len(graph.reducible), "torch._dynamo" in sys.modules)
"""


def test_tracing_and_proving_imports_no_compiler() -> None:
    assert programs.run(["-c", INSPECT]).stdout.split() == ["1", "False"]
