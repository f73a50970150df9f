"""The table of rules: what is entered is used, what is foreign is not mistaken for PyTorch's own."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import intrafusion
from intrafusion.trace import Call, LabelledTensor, Ledger, register_rule, trace
from intrafusion.trace.rules.norm import find_eps

TRACE = Path(intrafusion.__file__).parent / "trace"


@torch.library.custom_op("test_rules::mean", mutates_args=())
def mean(x: Tensor) -> Tensor:
    """Has the name of an operation of PyTorch, and does something else: each channel comes out as its successor."""
    return x.roll(1, dims=-1)


@torch.library.custom_op("test_rules::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


class Through(nn.Module):
    """An operation between two layers."""

    def __init__(self, operation: object) -> None:
        super().__init__()
        self.operation, self.enter, self.leave = operation, nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.operation(self.enter(x)))  # type: ignore[operator]


def keep_labels(ledger: Ledger, call: Call) -> LabelledTensor:
    info = ledger.look_up(call["x"])
    assert isinstance(info, LabelledTensor)
    return LabelledTensor(info.labels)


def test_a_foreign_operation_is_not_mistaken_for_one_of_the_same_name() -> None:
    group = trace(Through(lambda x: mean(x)), torch.randn(5, 3))["enter"]
    assert group.reason == "operation without a rule: test_rules::mean in the network"


def test_a_registered_rule_is_used() -> None:
    model, x = Through(lambda x: twice(x)), torch.randn(5, 3)
    assert "without a rule: test_rules::twice" in (trace(model, x)["enter"].reason or "")
    register_rule("test_rules::twice", keep_labels)
    group = intrafusion.inspect(model, x)["enter"]
    assert group.reason is None
    assert [(m.tensor, m.dim) for m in group.members] == [("enter.weight", 0), ("leave.weight", 1), ("enter.bias", 0)]


@pytest.mark.parametrize("operation", ["mean", "aten::mean"])
def test_a_rule_is_replaced_only_when_asked(operation: str) -> None:
    with pytest.raises(
        ValueError, match=r"register_rule: 'mean' has a rule already; pass replace=True to replace it\."
    ):
        register_rule(operation, keep_labels)


def imports(path: Path) -> Iterator[str]:
    """Modules of the tracer that a file imports, under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("intrafusion.trace."):
            module = (node.module or "").removeprefix("intrafusion.trace.")
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))


def test_no_two_files_of_the_tracer_need_each_other() -> None:
    """And no rule knows who dispatches it."""
    files = {str(f.relative_to(TRACE).with_suffix("")).replace("/", "."): f for f in sorted(TRACE.rglob("*.py"))}
    files = {name.removesuffix(".__init__"): path for name, path in files.items() if name != "__init__"}
    graph = {name: files.keys() & set(imports(path)) - {name} for name, path in files.items()}
    assert "dispatch" in graph
    assert not any("dispatch" in needed for name, needed in graph.items() if name.startswith("rules"))
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("name", ["native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"])
def test_what_a_norm_adds_to_the_variance_is_known_on_every_device(name: str) -> None:
    """It was taken for 0 on GPUs, where the operation has another name for it: folding was off by it."""
    x, v = torch.zeros(1, 2, 1, 1), torch.zeros(2)
    arguments = (x, v, v, v, v, False, 0.1, 1e-5)
    assert find_eps(Call(getattr(torch.ops.aten, name).default, arguments, {}, (x,), "")) == 1e-5


class Summed(nn.Module):
    """Sums that begin as zeros, or as what is no one number, and are added to in place."""

    def __init__(self, begin: str, rows: bool) -> None:
        super().__init__()
        self.a, self.b, self.begin, self.rows = nn.Linear(5, 8), nn.Linear(8, 3), begin, rows

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        total = torch.zeros(3, 8) if self.begin == "zeros" else torch.arange(24.0).view(3, 8)
        if self.rows:
            total.index_add_(0, torch.tensor([2, 0, 1]), h)
        else:
            total += h
        return self.b(total)


@pytest.mark.parametrize("rows", [False, True], ids=["added", "rows added"])
def test_what_is_written_in_place_is_seen_as_it_was(rows: bool) -> None:
    """What zeros hold once channels were added to them varies with the channels, and tells none apart."""
    summed = trace(Summed("zeros", rows), torch.randn(3, 5))["a"]
    assert (summed.size, summed.reason) == (8, None)
    groups = trace(Summed("numbers", rows), torch.randn(3, 5)).groups
    assert not [g for g in groups if g.reducible and g.size > 1]


def test_a_concatenation_with_no_rows_is_followed() -> None:
    """As of experts to which no token goes."""
    net = nn.Sequential(nn.Linear(5, 8), Padded(), nn.Linear(8, 3))
    assert trace(net, torch.randn(3, 5))["0"].reason is None


class Padded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:2], x[2:2], x[2:]])
