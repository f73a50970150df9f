"""Networks as one file: what is written is run by other programs, and a failure leaves nothing behind."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from bare import compress
from torch import Tensor, nn

import intrafusion
import intrafusion.io.export as export_module
from intrafusion import export
from intrafusion.errors import ArgumentError, FolderError, ModelError
from intrafusion.io.export import export_inputs
from intrafusion.network.inputs import Inputs

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
FRESH = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two outputs and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head, self.drop = nn.Linear(8, 2), nn.Dropout()

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.norm(self.stem(x)).relu().mean((2, 3))
        return {"logits": self.head(self.drop(x)), "power": x.square().mean(1)}


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor, mask: Tensor | None = None, scale: bool = False) -> Tensor:
        x = self.embed(ids) if mask is None else self.embed(ids) * mask[..., None]
        return self.head(x) * (2 if scale else 1)


class Spoken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(10, 4), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.up(self.embed(ids) * (1 if mask is None else mask[..., None])).relu()
        return {"logits": self.head(x), "mean": x.mean((0, 1, 2))}


class Of(nn.Module):
    """A linear layer and what a function does with its output."""

    def __init__(self, then: Any) -> None:
        super().__init__()
        self.linear, self.then = nn.Linear(4, 4), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.linear(x))


def seeded(make: Any, *args: Any) -> nn.Module:
    torch.manual_seed(0)
    return make(*args).eval()


def run_onnx(path: Path, *tensors: Tensor) -> list[Tensor]:
    runtime = pytest.importorskip("onnxruntime", reason="needs intrafusion[onnx]")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    named = {i.name: t.numpy() for i, t in zip(session.get_inputs(), tensors, strict=True)}
    return [torch.from_numpy(found) for found in session.run(None, named)]


@pytest.fixture
def onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs intrafusion[onnx]")


def test_onnx_of_a_compressed_network_takes_batches_of_every_size(onnx: None, tmp_path: Path) -> None:
    small = compress(seeded(Net).train(), X, 0.5)
    found = small.export(tmp_path / "new" / "net.onnx")
    small.model.eval()
    for tensor, expected in zip(run_onnx(found.path, FRESH), small.model(FRESH).values(), strict=True):
        torch.testing.assert_close(tensor, expected, check_dtype=True)
    assert (found.any_batch, found.opset, found.path) == (True, 20, tmp_path / "new" / "net.onnx")
    assert found.difference < 1e-5
    assert str(found).startswith(f"{found.path}: ONNX, opset 20, any batch size; in onnxruntime its outputs are the ")
    assert os.listdir(tmp_path / "new") == ["net.onnx"]


def test_a_program_takes_batches_of_every_size(tmp_path: Path) -> None:
    net = seeded(Net)
    found = export(net, X, tmp_path / "net.pt2")
    program = torch.export.load(found.path).module()
    torch.testing.assert_close(program(FRESH), net(FRESH))
    assert (found.any_batch, found.opset) == (True, None)
    assert "a program of torch.export, any batch size; in PyTorch" in str(found)


def test_the_outputs_that_matter_alone(onnx: None, tmp_path: Path) -> None:
    net = seeded(Net)
    small = intrafusion.compress(net, X, keep=0.5, restore=None, outputs=["power"], progress=False)
    small.export(tmp_path / "net.onnx")
    (power,) = run_onnx(tmp_path / "net.onnx", FRESH)
    torch.testing.assert_close(power, small.model(FRESH)["power"])


def test_the_outputs_that_matter_of_named_inputs_take_batches_of_every_size(onnx: None, tmp_path: Path) -> None:
    net = seeded(Spoken)
    ids, mask = torch.arange(10).view(2, 5), torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    call = {"ids": ids, "mask": mask}
    small = intrafusion.compress(net, call, keep=0.5, restore=None, outputs=["logits"], progress=False)
    found = small.export(tmp_path / "net.onnx")
    assert found.any_batch
    fresh = torch.tensor([[3, 3, 1, 0, 9]])
    (logits,) = run_onnx(found.path, fresh, torch.ones_like(fresh))
    torch.testing.assert_close(logits, small.model(fresh, torch.ones_like(fresh))["logits"])


def test_named_inputs_flags_and_indices(onnx: None, tmp_path: Path) -> None:
    net = seeded(Words)
    ids, mask = torch.arange(10).view(2, 5), torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    found = export(net, {"ids": ids, "mask": mask, "scale": True}, tmp_path / "net.onnx")
    fresh = torch.tensor([[3, 3, 1, 0, 9]])
    (logits,) = run_onnx(found.path, fresh, torch.ones_like(fresh))
    torch.testing.assert_close(logits, net(fresh, torch.ones_like(fresh), scale=True))


def test_texts_of_every_length(onnx: None, tmp_path: Path) -> None:
    net = seeded(Spoken)
    mask = torch.ones(2, 5, dtype=torch.long)
    for name, length in (("net.onnx", 5), ("net.pt2", 5), ("short.pt2", 2)):
        found = export(
            net, {"ids": torch.arange(2 * length).view(2, length), "mask": mask[:, :length]}, tmp_path / name
        )
        assert (found.any_batch, found.any_length) == (True, length > 2)
        assert ("any batch size and length of text" in str(found)) == found.any_length
    for ids in (torch.tensor([[3]]), torch.tensor([[3, 3, 1, 0, 9, 4, 4, 5]])):
        expected = net(ids, torch.ones_like(ids))["logits"]
        torch.testing.assert_close(run_onnx(tmp_path / "net.onnx", ids, torch.ones_like(ids))[0], expected)
        program = torch.export.load(tmp_path / "net.pt2").module()
        torch.testing.assert_close(program(ids=ids, mask=torch.ones_like(ids))["logits"], expected)


class Compared(nn.Module):
    """Two texts of lengths of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)

    def forward(self, question: Tensor, answer: Tensor) -> Tensor:
        return (self.embed(question).mean(1) * self.embed(answer).sum(1)).sum(-1)


def test_two_texts_of_different_lengths(onnx: None, tmp_path: Path) -> None:
    net = seeded(Compared)
    found = export(net, (torch.arange(10).view(2, 5), torch.arange(6).view(2, 3)), tmp_path / "net.onnx")
    assert found.any_length
    assert axes_of(found.path) == {
        "question": ["batch", "question_length"], "answer": ["batch", "answer_length"], "output": ["batch"]
    }  # fmt: skip
    fresh = torch.arange(9).view(3, 3), torch.arange(6, 9).view(3, 1)
    torch.testing.assert_close(run_onnx(found.path, *fresh)[0], net(*fresh))


class TimeFirst(nn.Module):
    """What is along the first dimension is added up, as a recurrent layer does without batch_first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(x) if x.dtype == torch.long else x
        return x.cumsum(0), x.sum(0)


def test_batches_of_every_size_where_time_comes_first(onnx: None, tmp_path: Path) -> None:
    """What was free was the time, and it was called the batch."""
    net = seeded(TimeFirst)
    numbers = export(net, torch.randn(5, 2, 4), tmp_path / "net.pt2")
    texts = export(net, torch.arange(10).view(5, 2), tmp_path / "net.onnx")
    assert (numbers.any_batch, numbers.any_length, texts.any_batch, texts.any_length) == (True, False, True, True)
    fresh = torch.randn(5, 3, 4)
    torch.testing.assert_close(torch.export.load(numbers.path).module()(fresh), net(fresh))
    fresh = torch.arange(8).view(2, 4)
    torch.testing.assert_close(tuple(run_onnx(texts.path, fresh)), net(fresh))
    assert axes_of(texts.path) == {
        "x": ["length", "batch"], "output_0": ["length", "batch", 4], "output_1": ["batch", 4]
    }  # fmt: skip


def test_a_network_of_one_length(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 2))
    found = export(net, torch.arange(6).view(2, 3), tmp_path / "net.pt2")
    assert (found.any_batch, found.any_length) == (True, False)
    fresh = torch.tensor([[3, 3, 1]])
    torch.testing.assert_close(torch.export.load(found.path).module()(fresh), net(fresh))


def test_a_network_of_one_batch_size(onnx: None, tmp_path: Path) -> None:
    net = seeded(Of, lambda x: x.reshape(2, 2, 2))
    found = export(net, torch.randn(2, 4), tmp_path / "net.onnx")
    assert not found.any_batch
    assert "the batch size of the example only" in str(found)
    fresh = torch.randn(2, 4)
    torch.testing.assert_close(run_onnx(found.path, fresh)[0], net(fresh))


def test_half_precision(onnx: None, tmp_path: Path) -> None:
    net = seeded(Net).half()
    found = export(net, X.half(), tmp_path / "net.onnx")
    logits, _ = run_onnx(found.path, FRESH.half())
    assert logits.dtype == torch.float16
    torch.testing.assert_close(logits, net(FRESH.half())["logits"], atol=1e-2, rtol=1e-2)


def test_many_weights_stand_beside_the_file(onnx: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "_LARGEST", 0)
    net = seeded(lambda: nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 3)))
    export(net, torch.randn(2, 64), tmp_path / "a" / "net.onnx")
    assert sorted(os.listdir(tmp_path / "a")) == ["net.onnx", "net.onnx.data"]
    with pytest.raises(FolderError, match=r"other\.onnx\.data: exists; choose another name"):
        (tmp_path / "a" / "other.onnx.data").write_text("precious")
        export(net, torch.randn(2, 64), tmp_path / "a" / "other.onnx")
    assert (tmp_path / "a" / "other.onnx.data").read_text() == "precious"
    assert not (tmp_path / "a" / "other.onnx").exists()
    (tmp_path / "a").rename(tmp_path / "b")
    fresh = torch.randn(3, 64)
    torch.testing.assert_close(run_onnx(tmp_path / "b" / "net.onnx", fresh)[0], net(fresh))


def test_a_file_that_is_replaced_never_has_the_weights_of_another(
    onnx: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "_LARGEST", 0)
    net, path, replace = nn.Linear(64, 64), tmp_path / "net.onnx", os.replace
    export(net, torch.randn(2, 64), path)

    def killed(source: Any, target: Any) -> None:
        if Path(target) == path:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        export(nn.Linear(64, 64), torch.randn(2, 64), path, overwrite=True)
    assert os.listdir(tmp_path) == ["net.onnx.data"]


def test_a_file_is_replaced_only_if_one_says_so(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_text("precious")
    with pytest.raises(FolderError, match=r"net\.pt2: exists; choose another name, or replace it"):
        export(seeded(Net), X, path)
    assert path.read_text() == "precious"
    export(seeded(Net), X, path, overwrite=True)
    assert path.read_bytes()[:2] == b"PK"


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (lambda x: torch.linalg.svdvals(x[:, :, None].expand(-1, 4, 4)), r"has no operation for aten\._linalg_svd of"),
        (
            torch.special.bessel_j0,
            r"ONNX has no operation for prims\.bessel_j0 of Of; .* a program \(\.pt2\)\. Where the",
        ),
        (lambda x: x if x.mean() > 0 else -x, r"Of goes by the values of its tensors \(.*test_export\.py, line \d+\)"),
        (lambda x: x + torch.randn(4), r"the file of Of gives other outputs \(they differ by .* draws random numbers"),
    ],
)
def test_what_the_format_lacks(then: Any, message: str, onnx: None, tmp_path: Path, capfd: Any) -> None:
    with pytest.raises(ModelError, match=message):
        export(seeded(Of, then), torch.randn(3, 4), tmp_path / "net.onnx")
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr().out == ""


def test_a_program_that_is_refused_says_so_in_the_error_alone(tmp_path: Path, capfd: Any) -> None:
    """PyTorch prints the graph of what it does not take, for each try once."""
    with pytest.raises(ModelError, match=r"Of goes by the values of its tensors"):
        export(seeded(Of, lambda x: x if x.mean() > 0 else -x), torch.randn(3, 4), tmp_path / "net.pt2")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("net.tflite", {}, r"expected a file that ends in \.onnx or \.pt2, got '.*net\.tflite'"),
        ("net.pt2", {"opset": 20}, r"opset= is a version of ONNX's operators; leave it out"),
        ("net.onnx", {"opset": 11}, r"opset: expected 18 or more.*got 11"),
    ],
)
def test_what_means_nothing(name: str, options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        export(seeded(Net), X, tmp_path / name, **options)


def test_a_version_of_operators_that_cannot_be_written(onnx: None, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"opset: the packages installed here write \d+, not 99; say another one"):
        export(seeded(Net), X, tmp_path / "net.onnx", opset=99)
    assert os.listdir(tmp_path) == []
    assert export(seeded(Net), X, tmp_path / "net.onnx", opset=18).opset == 18


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxscript" else known(name, *a))
    with pytest.raises(ModelError, match=r"onnxscript.* not installed; run: pip install 'intrafusion\[onnx\]'"):
        export(seeded(Net), X, tmp_path / "net.onnx")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "net.pt2").mkdir()
    with pytest.raises(FolderError, match="this is a folder"):
        export(seeded(Net), X, tmp_path / "net.pt2", overwrite=True)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"second": self.layer(x), "first": self.layer(x).relu()}


def test_outputs_in_onnx_are_called_as_in_their_dict(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, x = Named().eval(), torch.randn(3, 4)
    intrafusion.export(model, torch.randn(2, 4), tmp_path / "named.onnx")
    session = runtime.InferenceSession(str(tmp_path / "named.onnx"), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["second", "first"]
    found = session.run(["first"], {"x": x.numpy()})[0]
    assert torch.allclose(torch.from_numpy(found), model(x)["first"], atol=1e-5)


def test_names_in_onnx_are_those_a_program_would_look_for(onnx: None, tmp_path: Path) -> None:
    texts = {"ids": torch.arange(10).view(2, 5), "mask": torch.ones(2, 5, dtype=torch.long)}
    assert axes_of(export(seeded(Spoken), texts, tmp_path / "texts.onnx").path) == {
        "ids": ["batch", "length"], "mask": ["batch", "length"],
        "logits": ["batch", "length", 3], "mean": [],
    }  # fmt: skip
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    assert axes_of(export(plain, torch.randn(2, 4), tmp_path / "plain.onnx").path) == {
        "input": ["batch", 4], "output": ["batch", 2],
    }  # fmt: skip


def axes_of(path: Path) -> dict[str, list[Any]]:
    session = importlib.import_module("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return {port.name: port.shape for port in (*session.get_inputs(), *session.get_outputs())}


def test_names_of_outputs_do_not_clash(onnx: None, tmp_path: Path) -> None:
    """Keys may be what other tensors of the file are called, which then was no file."""
    net = seeded(Of, lambda x: {"relu": x, "more": [x.relu(), {"x": x + 1}], "linear.weight": x, "x": x, "": x, 3: x})
    export(net, torch.randn(2, 4), tmp_path / "net.onnx")
    assert list(axes_of(tmp_path / "net.onnx")) == [
        *("x", "relu", "more_0", "more_1_x", "linear.weight_output", "x_output", "output", "output_3")
    ]


def test_a_tensor_that_is_given_twice_may_be_two_in_another_call(tmp_path: Path) -> None:
    net, x = seeded(nn.Bilinear, 4, 4, 3), torch.randn(4)
    found = export(net, (x, x), tmp_path / "net.pt2")
    fresh = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(torch.export.load(found.path).module()(*fresh), net(*fresh))


def test_nothing_is_logged_of_what_was_tried(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    export(seeded(Of, lambda x: torch.stack(list(x))), torch.randn(2, 4), tmp_path / "net.pt2")
    assert capfd.readouterr() == ("", "")


class Pair(NamedTuple):
    logits: Tensor
    sizes: list[Any]


@dataclass
class Answer:
    logits: Tensor
    sizes: list[Any]


@pytest.mark.parametrize("kind", [Pair, Answer])
def test_a_file_needs_no_class_of_the_output(kind: Any, tmp_path: Path) -> None:
    net = seeded(Of, lambda x: kind(x, [x.mean(1), 3]))
    found = export(net, torch.randn(2, 4), tmp_path / "net.pt2")
    fresh = torch.randn(5, 4)
    read = torch.export.load(found.path).module()(fresh)
    assert type(read) is dict
    assert read["sizes"][1] == 3
    torch.testing.assert_close(read["logits"], net(fresh).logits)


def test_onnx_has_the_tensors_of_an_output_alone(onnx: None, tmp_path: Path) -> None:
    net = seeded(Of, lambda x: {"logits": x, "scale": 3, "none": None})
    export(net, torch.randn(2, 4), tmp_path / "net.onnx")
    fresh = torch.randn(5, 4)
    (logits,) = run_onnx(tmp_path / "net.onnx", fresh)
    torch.testing.assert_close(logits, net(fresh)["logits"])


def test_a_length_in_the_code_is_no_batch_size(tmp_path: Path) -> None:
    net = seeded(Of, lambda x: x.view(len(x), 2, 2))
    found = export(net, torch.randn(2, 4), tmp_path / "net.pt2")
    assert found.any_batch
    fresh = torch.randn(5, 4)
    torch.testing.assert_close(torch.export.load(found.path).module()(fresh), net(fresh))


class Keywords(nn.Module):
    """Takes what it needs from whatever it is given, as forwards that pass their arguments on do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, first: Tensor, *others: Tensor, **named: Tensor) -> Tensor:
        return self.first(first) + self.second(named["second"]) * named["scale"] + sum(others)


@pytest.mark.parametrize("others", [0, 1])
def test_keywords_without_a_name_in_the_forward_take_batches_of_every_size(others: int, tmp_path: Path) -> None:
    net = seeded(Keywords)
    make = lambda size: (  # noqa: E731
        *(torch.randn(size, 4), *(torch.randn(size, 3) for _ in range(others))),
        {"scale": torch.rand(size, 1), "second": torch.randn(size, 4)},
    )
    *args, named = make(2)
    found = export_inputs(net, Inputs(tuple(args), named), tmp_path / "net.pt2")
    assert found.any_batch
    *args, named = make(5)
    torch.testing.assert_close(torch.export.load(found.path).module()(*args, **named), net(*args, **named))


class Labelled(nn.Module):
    """Texts and types beside a tensor, of which a program can hold none."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"logits": self.head(self.body(x).relu()), "task": ("cls", 3), "dtype": x.dtype}


def test_a_program_has_none_in_place_of_texts(tmp_path: Path) -> None:
    net, x = seeded(Labelled), torch.randn(5, 4)
    export(net, torch.randn(2, 4), tmp_path / "net.pt2")
    small = intrafusion.compress(net, torch.randn(2, 4), 0.5, restore=None)
    small.save(tmp_path / "small", program=True)
    programs = (
        torch.export.load(tmp_path / "net.pt2").module(),
        intrafusion.load(tmp_path / "small", trust_program=True),
    )
    for program, original in zip(programs, (net, small.model), strict=True):
        found = program(x)
        torch.testing.assert_close(found.pop("logits"), original(x)["logits"])
        assert found == {"task": (None, 3), "dtype": None}


def test_whole_numbers_that_differ_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gives other outputs"):
        export(seeded(Of, lambda x: torch.randint(0, 1000, (9,))), torch.randn(2, 4), tmp_path / "net.pt2")


def test_a_precision_that_the_runtime_lacks_is_refused_with_a_way_out(onnx: None, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"NOT_IMPLEMENTED.*; export model\.float\(\), or a program"):
        export(seeded(Of, torch.relu).bfloat16(), torch.randn(1, 4).bfloat16(), tmp_path / "net.onnx")


def test_a_precision_that_its_operations_do_not_take_has_the_same_way_out(onnx: None, tmp_path: Path) -> None:
    """The place where it was written meanwhile is nobody's business."""
    path = tmp_path / "net.onnx"
    with pytest.raises(ModelError, match=rf"INVALID_GRAPH.* {path} .*; export model\.float\(\), or a program"):
        export(nn.Conv1d(2, 3, 1).bfloat16(), torch.randn(1, 2, 4).bfloat16(), path)


@pytest.mark.parametrize("x", [torch.randn(0, 4), torch.full((2, 4), torch.nan)])
def test_an_example_on_which_nothing_can_be_compared_is_refused(x: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"example_inputs: .* outputs that are empty, NaN or infinite throughout"):
        export(nn.Linear(4, 3), x, tmp_path / "net.pt2")
    assert os.listdir(tmp_path) == []


def test_a_network_without_parameters_yet_is_refused_and_stays_what_it_is(tmp_path: Path) -> None:
    net = nn.Sequential(nn.LazyLinear(8), nn.LazyLinear(2))
    with pytest.raises(ModelError, match=r"'0\.weight' is not initialised yet.*; run the network once first"):
        export(net, torch.randn(3, 4), tmp_path / "net.pt2")
    assert net(torch.randn(3, 4)).shape == (3, 2)


def test_a_wrapped_network_is_exported_as_the_one_inside(onnx: None, tmp_path: Path) -> None:
    export(nn.DataParallel(Named()), torch.randn(2, 4), tmp_path / "net.onnx")
    assert list(axes_of(tmp_path / "net.onnx")) == ["x", "second", "first"]


class Encoder(nn.Module):
    """Of padded positions, PyTorch makes zeros on one of its ways and other numbers on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layers(x, src_key_padding_mask=mask)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_zeros_that_only_a_fast_path_leaves_are_named(tmp_path: Path) -> None:
    call = (torch.randn(3, 5, 8), torch.arange(5) > torch.tensor([[4], [2], [3]]))
    with pytest.raises(
        ModelError, match=r"gives other outputs .*fast path of attention.* say enable_nested_tensor=Fal"
    ):
        export(seeded(Encoder), call, tmp_path / "net.pt2")
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_name_that_is_too_long_and_a_scripted_network(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="choose a shorter name"):
        export(seeded(Net), X, tmp_path / f"{'a' * 300}.pt2")
    with pytest.raises(ModelError, match=r"is TorchScript.*; build it from its Python class"):
        export(torch.jit.script(nn.Linear(4, 3)), torch.randn(2, 4), tmp_path / "net.pt2")


def test_complex_outputs_are_refused_with_a_way_out(onnx: None, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"gives float32\[1, 4, 2\], expected complex64\[1, 4\] \(return torch\.view_as_"
    ):
        export(seeded(Of, torch.fft.fft), torch.randn(1, 4), tmp_path / "net.onnx")
