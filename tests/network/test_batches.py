"""The forms that calibration images come in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import intrafusion
from intrafusion.errors import ModelError
from intrafusion.network.batches import cast_like, join_batches, read_batches, read_labelled, reading
from intrafusion.network.calibration_images import as_calls
from intrafusion.network.input_batches import read_input_batches
from intrafusion.network.inputs import Inputs

IMAGES = torch.arange(12.0).reshape(4, 3)
LABELS = torch.arange(4)


@pytest.mark.parametrize(
    "images",
    [
        IMAGES,
        [IMAGES[:3], IMAGES[3:]],
        (IMAGES[:1], IMAGES[1:]),
        [(IMAGES[:2], LABELS[:2]), [IMAGES[2:], LABELS[2:]]],
        DataLoader(TensorDataset(IMAGES, LABELS), batch_size=3),
        iter([IMAGES]),
        Inputs((IMAGES,)),
    ],
    ids=["tensor", "list", "tuple", "labelled", "loader", "generator", "inputs"],
)
def test_every_form_gives_the_same_call(images: object) -> None:
    call = join_batches(read_batches(images))  # type: ignore[arg-type]
    assert call.kwargs in ({}, None)
    assert torch.equal(call.args[0], IMAGES)


def test_dicts_are_keyword_arguments() -> None:
    call = join_batches(read_batches([{"x": IMAGES[:1], "scale": 2.0}, {"x": IMAGES[1:], "scale": 2.0}]))
    assert call.args == ()
    assert call.kwargs is not None
    assert torch.equal(call.kwargs["x"], IMAGES)
    assert call.kwargs["scale"] == 2.0


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([(IMAGES[:2], LABELS[:2]), [IMAGES[2:], LABELS[2:]]], [[0, 1], [2, 3]]),
        (DataLoader(TensorDataset(IMAGES, LABELS), batch_size=3), [[0, 1, 2], [3]]),
        ({"x": IMAGES, "labels": LABELS}, [[0, 1, 2, 3]]),
        ([IMAGES, (IMAGES,), (IMAGES, "cats"), {"x": IMAGES}, ({"x": IMAGES}, LABELS)], [None] * 4 + [[0, 1, 2, 3]]),
        (IMAGES, [None]),
    ],
    ids=["tuples", "loader", "dict", "mixed", "tensor"],
)
def test_labels_come_along(images: object, expected: list[list[int] | None]) -> None:
    found = [labels for _, labels in read_labelled(images)]  # type: ignore[arg-type]
    assert [None if labels is None else labels.tolist() for labels in found] == expected


def test_one_batch_is_read_at_a_time() -> None:
    read = []

    def loader():  # type: ignore[no-untyped-def]
        for index in range(3):
            read.append(index)
            yield IMAGES

    stream = read_labelled(loader())
    next(stream)
    assert read == [0]


def test_precision_follows_the_network_but_integers_stay() -> None:
    call = cast_like(Inputs((IMAGES, LABELS)), torch.nn.Linear(3, 1).double())
    assert [t.dtype for t in call.args] == [torch.float64, torch.int64]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one batch, got none"),
        (3, "got 3"),
        (["a"], "expected tensors, got text 'a'; pass what tokenizer"),
        ([torch.zeros(1, 3), torch.zeros(1, 4)], r"one shape, got \[\(3,\), \(4,\)\]"),
        ([{"x": IMAGES}, IMAGES], "same arguments in every batch"),
    ],
)
def test_what_is_no_image(images: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        join_batches(read_batches(images))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_mode_that_a_loader_is_in_ends_where_its_batches_are_used(mode: Callable[[], Any]) -> None:
    seen = []

    def load() -> Iterator[torch.Tensor]:
        with mode():
            for part in IMAGES.split(2):
                seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
                yield part
        seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    inside = (mode is torch.inference_mode, False)
    for _ in read_labelled(load()):
        assert (torch.is_inference_mode_enabled(), torch.is_grad_enabled()) == (False, True)
    assert seen == [inside, inside, (False, True)]


class Interrupted:
    """Is interrupted while it ends."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        try:
            yield from torch.randn(60, 3, generator=torch.Generator().manual_seed(0)).split(10)
        except GeneratorExit:
            raise KeyboardInterrupt from None


MODEL = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)).eval()
PARTS: dict[str, Callable[[], Any]] = {
    "the first of a loader": lambda: read_input_batches(Interrupted(), memory=500).first,
    "some of a loader": lambda: read_input_batches(Interrupted(), MODEL, 500),
    "calls": lambda: next_of(as_calls(Interrupted(), MODEL, Inputs((IMAGES,)))),
    "selected": lambda: intrafusion.compress(MODEL, IMAGES, 0.5, reducer="select", restore=None, inputs=Interrupted()),
}


def next_of(calls: Any) -> Inputs:
    with reading(calls) as found:
        return next(found)


@pytest.mark.parametrize("part", PARTS)
def test_an_interrupt_while_a_loader_ends_is_not_lost(part: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        PARTS[part]()


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_end_where_reading_does(persistent: bool) -> None:
    loader = DataLoader(TensorDataset(IMAGES), 1, num_workers=1, persistent_workers=persistent)
    with reading(loader) as batches:
        next(batches)
    (worker,) = batches._workers  # type: ignore[attr-defined]
    assert worker.is_alive() == persistent
    batches._shutdown_workers()  # type: ignore[attr-defined]
