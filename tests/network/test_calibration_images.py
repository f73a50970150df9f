"""Images in whatever form, as calls like the example inputs; faults are told with the number of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import intrafusion
from intrafusion import IntrafusionWarning, ModelError, compress
from intrafusion.lab.zoo.images import Images as Labelled
from intrafusion.network.calibration_images import as_calls
from intrafusion.network.inputs import Inputs

A, B = torch.randn(2, 40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40)


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Linear(16, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.b(F.relu(self.a(image)).mean((2, 3)))


class Siamese(Single):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(a) - super().forward(b)


class Pairs(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        if index == 25:
            raise OSError("truncated file")
        return A[index], 0


def given(images: Any, model: nn.Module, like: Any) -> tuple[Inputs, list[int] | None]:
    """All arguments, and the labels."""
    calls = as_calls(images, model, Inputs.of(like))
    assert calls is not None
    found = list(calls)
    parts = [torch.cat([c.tensors()[k] for c in found]) for k in range(len(found[0].tensors()))]
    labels = [c.labels for c in found]
    return Inputs(tuple(parts)), None if labels[0] is None else torch.cat(labels).tolist()  # type: ignore[arg-type]


ONE = {
    "array": A.numpy(),
    "arrays in a list": [A[:20].numpy(), A[20:].numpy()],
    "arrays in tuples": [(A.numpy(), LABELS.numpy())],
    "dict of an array": {"image": A.numpy()},
    "extra keys": [
        {"image": A[:20], "label": LABELS[:20], "path": ["p"] * 20},
        {"image": A[20:], "label": LABELS[20:]},
    ],
    "the zoo's": Labelled(A, LABELS),
    "one batch object": SimpleNamespace(images=A, labels=LABELS),
    "inputs": [Inputs((A,))],
}


@pytest.mark.parametrize("form", ONE)
def test_forms_of_one_image(form: str) -> None:
    call, labels = given(ONE[form], Single(), A[:2])
    assert len(call.args) == 1
    assert torch.equal(call.args[0], A)
    wants_labels = form in ("arrays in tuples", "extra keys", "the zoo's", "one batch object")
    assert labels == (LABELS.tolist() if wants_labels else None)
    small = compress(Single().eval(), A[:2], 0.5, images=ONE[form])
    assert small.restored[0].on == "40 images"


TWO = {
    "loader": DataLoader(TensorDataset(A, B, LABELS), 16),
    "without labels": [(A, B)],
    "lists": [[A[:30], B[:30]], [A[30:], B[30:]]],
    "dicts": [{"a": A, "b": B, "label": LABELS}],
    "arrays": [(A.numpy(), B.numpy())],
}


@pytest.mark.parametrize("form", TWO)
def test_forms_of_two_images(form: str) -> None:
    call, labels = given(TWO[form], Siamese(), (A[:2], B[:2]))
    assert torch.equal(call.args[0], A)
    assert torch.equal(call.args[1], B)
    assert labels == (LABELS.tolist() if form in ("loader", "dicts") else None)


class Optional(Single):
    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(a) if b is None else super().forward(a) - super().forward(b)


def read(images: Any, like: Any) -> tuple[list[tuple[list[str], int]], list[str]]:
    """Arguments and images of each call, and the keys of what is told of them."""
    calls = as_calls(images, Optional(), Inputs.of(like))
    assert calls is not None
    names = lambda call: [*("a", "b")[: len(call.args)], *(call.kwargs or {})]  # noqa: E731
    return [(names(call), len(call.tensors()[0])) for call in calls], sorted(calls.notes)


PAIR, FIRST = (A[:2], B[:2]), A[:2]
READ: dict[str, tuple[Any, Any, Any, list[str]]] = {
    "a call": ((A, B), PAIR, [(["a", "b"], 40)], []),
    "a call of arrays": ((A.numpy(), B.numpy()), PAIR, [(["a", "b"], 40)], []),
    "a call and labels": ((A, B, LABELS), PAIR, [(["a", "b"], 40)], []),
    "a tuple of calls": (((A, B), (B, A)), PAIR, [(["a", "b"], 40)] * 2, []),
    "batches or a call": ((A, B), FIRST, [(["a"], 40)] * 2, ["tuple"]),
    "batches": ([A, B], FIRST, [(["a"], 40)] * 2, []),
    "uneven batches": ((A, B[:9]), FIRST, [(["a"], 40), (["a"], 9)], []),
    "more batches than arguments": (A.split(10), FIRST, [(["a"], 10)] * 4, []),
    "labels or an argument": ([(A, B)], FIRST, [(["a"], 40)], ["second"]),
    "labels": ([(A, LABELS)], FIRST, [(["a"], 40)], []),
    "a batch and labels": ((A, LABELS), FIRST, [(["a"], 40)], []),
    "by name": ((A, LABELS), {"b": FIRST}, [(["b"], 40)], []),
    "by name, in a list": ([(A, LABELS), B], {"b": FIRST}, [(["b"], 40)] * 2, []),
    "another argument": ([{"a": A, "b": B}], FIRST, [(["a", "b"], 40)], ["more"]),
}


@pytest.mark.parametrize("case", READ)
def test_the_example_decides_between_batches_and_arguments(case: str) -> None:
    images, like, expected, notes = READ[case]
    assert read(images, like) == (expected, notes)


def test_what_a_tuple_was_taken_for_is_told() -> None:
    with pytest.warns(IntrafusionWarning, match="2 tensors was read as 2 batches, .* where they are a, b of one call"):
        small = compress(Optional().eval(), FIRST, 0.5, inputs=(A, B))
    assert small.images is not None
    assert small.images.count == 80 - 16
    with pytest.warns(IntrafusionWarning, match="the second was taken for labels, .* where it is b, give it in the"):
        compress(Optional().eval(), FIRST, 0.5, inputs=[(A, B)])


@pytest.mark.parametrize("images", [[A, B], A, (A, B[:9]), A.numpy()])
def test_one_argument_of_two_is_an_error(images: Any) -> None:
    with pytest.raises(ModelError, match=r"expected 2 arguments as in the example inputs, got .* alone; a batch is a"):
        compress(Optional().eval(), PAIR, 0.5, inputs=images)
    with pytest.raises(ModelError, match=r"expected a dict with a, b as in the example, got .* alone"):
        compress(Optional().eval(), {"a": FIRST, "b": FIRST}, 0.5, inputs=images)


BAD = A[:20].clone()
BAD[3, 1, 2, 2] = float("nan")


class Image:
    """As Pillow's."""

    __module__ = "PIL.Image"


FAULTS: dict[str, tuple[Any, str]] = {
    "nan": ([A[:20], BAD], r"batch 1 of images: expected finite images, got NaN or infinity in \[20, 3, 8, 8\]"),
    "one image alone": ([(image, 0) for image in A], r"batch 0 of images: expected a batch, .* one image alone; put a"),
    "empty": ([A, A[:0]], r"batch 1 of images: expected at least one image"),
    "unknown keys": ([{"picture": A}], r"batch 0 of images: .* forward \(image\), got the keys picture"),
    "a text": ("folder", "an iterable of batches, got 'folder'; read files into tensors"),
    "texts": ([["a", "b"]], "inputs: expected tensors, got texts such as 'a', and no tokenizer; pass tokenizer="),
    "objects": ([np.array(["a"], object)], "batch 0 of images: expected arrays of numbers, got one of object"),
    "a file that is broken": (DataLoader(Pairs(), 10), "images: batch 2 cannot be read: OSError: truncated file"),
    "a data set": (Pairs(), "got a Pairs; put a DataLoader around a data set"),
    "another size": ([A[:, :2]], r"does not run on batch 0 of images \(float32\[40, 2, 8, 8\]\): RuntimeError"),
    "channels last": (
        np.zeros((40, 8, 8, 3), np.uint8),
        r"images: expected channels where the example inputs have them, got uint8\[40, 8, 8, 3\] .*permute\(0, 3",
    ),
    "pictures one by one": ([np.zeros((9, 9, 3), np.uint8)] * 40, r"expected a batch, got uint8\[9, 9, 3\]"),
    "files that nobody decoded": ([Image()] * 40, "got an Image; make normalised tensors of pictures"),
    "nothing": ([], "images: expected at least one batch, got none"),
    "a number": (3, "images: expected a tensor.* got 3"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_of_the_images(fault: str) -> None:
    images, message = FAULTS[fault]
    for restore in ("auto", "images"):
        with pytest.raises(ModelError, match=message) as caught:
            compress(Single().eval(), A[:2], 0.5, images=images, restore=restore)
        assert "the example inputs (" not in str(caught.value)


def test_batches_may_have_other_sizes_where_the_network_takes_them() -> None:
    small = compress(Single().eval(), A[:2], 0.5, images=[A, A[..., :7]])
    assert small.images is not None
    assert {call.args[0].shape[-1] for call in small.images} == {A.shape[-1], 7}


def test_faults_of_two_images() -> None:
    with pytest.raises(ModelError, match="batch 0 of images: expected 2 arguments as in the example inputs.* got 1"):
        compress(Siamese().eval(), (A[:2], B[:2]), images=[(A,)])
    with pytest.raises(ModelError, match="batch 0 of images: expected a dict with a, b as in the example, got a tuple"):
        compress(Siamese().eval(), {"a": A[:2], "b": B[:2]}, images=[(A, B)])
    with pytest.raises(ModelError, match=r"arguments of forward \(a, b\), got the keys a"):
        compress(Siamese().eval(), {"a": A[:2], "b": B[:2]}, images=[{"a": A}])


def test_floating_numbers_are_no_tokens() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)).eval()
    with pytest.raises(ModelError, match="images: expected int64 as in the example inputs, got float32"):
        compress(model, torch.zeros(2, 5, dtype=torch.long), images=torch.zeros(40, 5))


def test_a_generator_that_was_read_before() -> None:
    stream: Iterator[Tensor] = iter([A])
    assert compress(Single().eval(), A[:2], images=stream).restored[0].on == "40 images"
    with pytest.raises(ModelError, match="a generator can be read only once"):
        compress(Single().eval(), A[:2], images=stream)


@pytest.mark.parametrize("function", [compress, intrafusion.compress_in_steps])
def test_whole_numbers_give_a_warning_and_a_note(function: Any) -> None:
    images = (A * 50 + 100).clamp(0, 255).to(torch.uint8)
    with pytest.warns(IntrafusionWarning, match="uint8 where the example inputs are float32") as warned:
        small = function(Single().eval(), A[:2], 0.5, images=images)
    assert any("normalise images as the network was trained" in note for note in small.notes)
    assert warned[0].filename == __file__


def test_few_images_give_a_warning_and_a_note() -> None:
    with pytest.warns(IntrafusionWarning, match="images: 5 are few"):
        small = compress(Single().eval(), A[:2], 0.5, images=A[:5])
    assert any("5 are few" in note for note in small.notes)
    assert not any("few" in note for note in compress(Single().eval(), A[:2], 0.5, images=A[:32]).notes)


def test_a_network_that_takes_whole_numbers_gets_them_in_peace() -> None:
    class Pixels(Single):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image.float() / 255)

    images = (A * 50 + 100).clamp(0, 255).to(torch.uint8)
    assert compress(Pixels().eval(), images[:2], 0.5, images=images).notes == ()


# ---- switches -------------------------------------------------------------------------------------------------------


class Switched(Single):
    """Returns more where it is asked to, which only positional and named switches tell."""

    def forward(self, a: Tensor, b: Tensor | None = None, more: bool = True, *, scale: float = 1.0) -> Any:  # type: ignore[override]
        inner = F.relu(self.a(a)).mean((2, 3)) * scale
        return (self.b(inner), inner) if more else self.b(inner)


@pytest.mark.parametrize(
    ("images", "like"),
    [
        ({"a": A}, {"a": FIRST, "more": False}),
        (A, {"a": FIRST, "more": False}),
        ([(A[:20], LABELS[:20]), (A[20:], LABELS[20:])], {"a": FIRST, "more": False, "scale": 1.0}),
        (A, (FIRST, None, False)),
        ({"a": A}, (FIRST, None, False)),
        ([Inputs((A,))], (FIRST, None, False)),
        ([Inputs((A,), {"scale": 1.0})], (FIRST, None, False)),
    ],
)
def test_switches_that_images_leave_out_are_those_of_the_example(images: Any, like: Any) -> None:
    network = Switched()
    calls = as_calls(images, network, Inputs.of(like))
    assert calls is not None
    given = [call.call(network) for call in calls]
    assert all(len(outputs) == 1 for outputs in given)
    torch.testing.assert_close(torch.cat([outputs[0] for outputs in given]), network(A, more=False))
    assert compress(Switched().eval(), like, 0.5, images=images).model.b.weight.shape == (4, 8)


def test_switches_that_images_bring_stay_as_they_are() -> None:
    calls = as_calls({"a": A, "scale": 2.0}, Switched(), Inputs.of({"a": FIRST, "more": False, "scale": 1.0}))
    assert calls is not None
    torch.testing.assert_close(next(iter(calls)).call(Switched().eval())[0].shape, (40, 4))
    assert next(iter(calls)).kwargs == {"a": A, "scale": 2.0, "more": False}


def test_tensors_inside_of_an_argument_are_missed_like_tensors() -> None:
    calls = as_calls({"a": A}, Optional(), Inputs.of({"a": FIRST, "b": (FIRST, FIRST)}))
    assert calls is not None
    with pytest.raises(ModelError, match=r"expected a dict with the arguments of forward \(a, b\), got the keys a"):
        list(calls)
