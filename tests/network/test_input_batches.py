"""Inputs as a sequence of calls: nothing is copied or joined, each image is there once, and faults are told."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import intrafusion
from intrafusion import ModelError, RecipeError
from intrafusion.network.calibration_images import as_calls
from intrafusion.network.free_memory import read_memory
from intrafusion.network.held_out import hold_out
from intrafusion.network.input_batches import Batches, read_input_batches
from intrafusion.network.inputs import Inputs
from intrafusion.restore import calibrate

X = torch.randn(100, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LITTLE = 16_000  # bytes: a few images are kept, and go through, at a time
IMAGE = X[0].nbytes


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))


MODEL = Net().eval()
MEMORY = 200_000  # bytes: about ten images at a time, and 80 kept


def loader(images: Tensor = X, size: int = 7, *, shuffle: bool = False) -> DataLoader:
    return DataLoader(TensorDataset(images, torch.arange(len(images))), batch_size=size, shuffle=shuffle)


@pytest.mark.parametrize(
    "images",
    [X, list(X.split(1)), list(X.split(30)), [X[:3], X[3:60], X[60:61], X[61:]], loader(), iter(X.split(9))],
    ids=["tensor", "ones", "some", "unlike", "loader", "generator"],
)
def test_every_image_is_in_one_batch_in_order_and_none_is_too_large(images: object) -> None:
    found = read_input_batches(images, MODEL, MEMORY)  # type: ignore[arg-type]
    assert found.size is not None
    assert 1 < found.size < 20
    counts = [len(call.args[0]) for call in found]
    assert counts == found.counts
    assert max(counts) <= found.size
    assert sum(counts) == found.count == 100
    assert sum(a + b <= found.size for a, b in itertools.pairwise(counts)) <= 1  # small ones were joined
    assert torch.equal(found.join().args[0], X)
    assert torch.equal(found[2].args[0], list(found)[2].args[0])
    assert torch.equal(found[1:3].join().args[0], torch.cat([call.args[0] for call in list(found)[1:3]]))
    assert str(found) == "100 images"


def test_what_is_cut_out_of_a_tensor_shares_its_memory() -> None:
    found = read_input_batches(X, MODEL, MEMORY)
    storages = {call.args[0].untyped_storage().data_ptr() for call in found}
    assert storages == {X.untyped_storage().data_ptr()}


def test_one_batch_is_made_at_a_time() -> None:
    found, alive = read_input_batches(list(X.split(1)), MODEL, MEMORY), list[weakref.ref[Tensor]]()
    for call in found:
        gc.collect()
        assert not any(ref() is not None for ref in alive)
        alive.append(weakref.ref(call.args[0]))
        del call


def test_labels_stay_with_their_images() -> None:
    for memory in (None, MEMORY, LITTLE):
        split = hold_out(as_calls(loader(), MODEL, Inputs((X[:1],))), MODEL, memory)  # type: ignore[arg-type]
        assert isinstance(split.seen, Batches)
        assert split.measured is not None
        assert (split.seen.count, split.measured.count) == (80, 20)
        for call in (*split.seen, *split.measured):
            assert call.labels is not None
            assert torch.equal(X[call.labels], call.args[0])


def test_a_loader_that_is_too_large_is_read_anew_and_gives_the_same() -> None:
    reads = []

    class Counted(DataLoader):
        def __iter__(self):  # type: ignore[no-untyped-def]
            reads.append(1)
            return super().__iter__()

    images = Counted(TensorDataset(X), batch_size=7)
    found = read_input_batches(images, MODEL, 20 * IMAGE * 4)
    assert not found.is_kept
    before = len(reads)
    assert str(found) == "100 images"
    assert len(reads) == before
    assert torch.equal(found.join().args[0], X)
    assert len(reads) == before + 1
    kept = read_input_batches(images, MODEL)
    assert kept.is_kept
    before = len(reads)
    assert torch.equal(kept.join().args[0], X)
    assert len(reads) == before


def test_it_is_known_what_is_kept_that_nobody_else_holds() -> None:
    assert read_input_batches(loader(), MODEL).part(torch.arange(40)).kept_bytes == X.nbytes
    assert read_input_batches(X, MODEL).kept_bytes == read_input_batches(list(X.split(30))).kept_bytes == 0
    assert read_input_batches(loader(), memory=LITTLE).kept_bytes == 0  # read anew


def test_a_generator_is_kept_as_it_can_be_read_once() -> None:
    found = read_input_batches((part for part in X.split(7)), MODEL, MEMORY)
    assert found.is_kept
    assert torch.equal(found.join().args[0], X)
    assert torch.equal(found.join().args[0], X)


class Changing:
    """Batches that change from one reading to the next."""

    def __init__(self, *readings: list[Tensor]) -> None:
        self.readings, self.count = readings, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.count += 1
        yield from self.readings[min(self.count, len(self.readings)) - 1]


PARTS = list(X.split(10))


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (PARTS[:-2], "got 8 batches, and 10 first"),
        ([*PARTS, PARTS[0]], "got more than 10 batches, which it gave first"),
        ([*PARTS[:3], PARTS[3] + 1, *PARTS[4:]], "got another batch 3 than it gave first"),
        ([*PARTS[:3], PARTS[3][:, :, :7], *PARTS[4:]], "got another batch 3 than it gave first"),
        ([*PARTS[:3], PARTS[3][:9], *PARTS[4:]], "got another batch 3 than it gave first"),
    ],
    ids=["ends early", "goes on", "other values", "another shape", "fewer images"],
)
def test_a_loader_that_changes_is_told_with_what_to_do(then: list[Tensor], message: str) -> None:
    images = Changing(PARTS, then)
    found = read_input_batches(images, None, 20 * IMAGE)
    with pytest.raises(ModelError, match=rf"same each time that they are read.*{message}.*neither shuffle nor draw"):
        list(found)


def test_one_that_shuffles_is_refused_where_it_is_not_kept_and_taken_where_it_is() -> None:
    images = loader(shuffle=True)
    with pytest.raises(ModelError, match="got another batch 0 than it gave first"):
        intrafusion.compress(MODEL, X[:1], 0.5, inputs=images, memory=80 * IMAGE)
    small = intrafusion.compress(MODEL, X[:1], 0.5, inputs=images)
    assert small.images is not None
    assert small.images.count == 80


def test_a_loader_that_is_empty_or_breaks_is_told_with_its_batch() -> None:
    def breaking() -> Iterator[Tensor]:
        yield from PARTS[:2]
        raise OSError("no such file")

    class Broken:
        def __iter__(self) -> Iterator[Tensor]:
            return breaking()

    nan = [*PARTS[:4], torch.full_like(PARTS[4], float("nan")), *PARTS[5:]]
    other = [*PARTS[:4], PARTS[4][:, :2]]
    for memory in (None, MEMORY):
        for images, message in (
            ([], "expected at least one batch, got none"),
            (DataLoader(TensorDataset(X[:0]), batch_size=2), "expected at least one batch, got none"),
            (Broken(), "batch 2 cannot be read: OSError: no such file"),
            (nan, "batch 4 of images: expected finite images, got NaN or infinity"),
            (other, "does not run on batch 4 of images|one shape"),
        ):
            with pytest.raises(ModelError, match=message):
                intrafusion.compress(MODEL, X[:1], 0.5, inputs=images, memory=memory)


@pytest.mark.parametrize("memory", [1, "1kB", 1000.5, 0, -3, "2XB", "GB", "", True, float("nan"), "inf", [2]])
def test_memory_that_means_nothing_or_is_too_little(memory: object) -> None:
    message = (
        "at least [0-9.]+ kB, as one of the images takes" if memory in (1, "1kB") else "expected bytes, at least one"
    )
    message = "expected bytes, at least one" if memory is True else message
    with pytest.raises(intrafusion.IntrafusionError, match=message):
        intrafusion.compress(MODEL, X[:1], 0.5, inputs=X, memory=memory)  # type: ignore[arg-type]


def test_the_least_memory_that_is_told_is_enough() -> None:
    with pytest.raises(RecipeError) as told:
        read_input_batches(X, MODEL, 1)
    least = str(told.value).partition("at least ")[2].partition(",")[0]
    assert read_input_batches(X, MODEL, read_memory(least)).counts == [1] * 100
    with pytest.raises(RecipeError, match="as a batch of 100, which cannot be cut, takes"):
        read_input_batches(X, Centred(), 1000)


class Centred(nn.Module):
    """Its answer to an image depends on the others in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize("images", [X, [X[:30], X[30:]]], ids=["one", "two"])
def test_calls_stay_as_they_came_where_rows_are_not_answered_one_by_one(images: object) -> None:
    found = read_input_batches(images, Centred(), 10**9)  # type: ignore[arg-type]
    assert found.size is None
    assert found.counts == ([100] if isinstance(images, Tensor) else [30, 70])


def test_results_do_not_depend_on_memory_nor_on_the_form_of_the_inputs() -> None:
    double = Net().eval().double()
    x = X.double()
    found = [
        intrafusion.compress(double, x[:1], 0.5, inputs=images, memory=memory).model.state_dict()
        for images, memory in ((x, None), (x, MEMORY * 2), (loader(x), None), (loader(x), LITTLE * 8))
    ]
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-7, atol=1e-9)


def test_a_calibration_holds_batches() -> None:
    found = calibrate(MODEL, X[:1], "images", loader(), memory=MEMORY)
    assert max(found.images.counts) < 20
    assert str(found) == "100 images"
    assert all(call.args[0].is_contiguous(memory_format=torch.channels_last) for call in found.images)


class Graph(nn.Module):
    """Nodes and a sparse matrix of their neighbours."""

    def forward(self, x: Tensor, near: Tensor) -> Tensor:
        return torch.sparse.mm(near, x)


def test_sparse_arguments_are_left_whole() -> None:
    graphs = [{"x": torch.randn(n, 3), "near": torch.eye(n).to_sparse()} for n in (5, 60)]
    found = read_input_batches(graphs, Graph())
    assert found.counts == [5, 60]
    assert [call.tensors()[1].shape for call in found] == [(5, 5), (60, 60)]
    assert hold_out(read_input_batches(graphs), Graph()).measured is None


def test_noise_that_has_to_go_through_at_once_is_less_where_memory_is_little() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    assert calibrate(model, X[:1], "noise").images.counts == [512]
    few = calibrate(model, X[:1], "noise", memory=MEMORY).images.counts
    assert len(few) == 1
    assert 2 <= few[0] < 30
    with pytest.raises(RecipeError, match="at least .* as a batch of 2, which cannot be cut"):
        calibrate(model, X[:1], "noise", memory=1000)


def test_a_result_with_its_inputs_can_be_pickled_and_copied() -> None:
    small = intrafusion.compress(MODEL, X[:1], 0.5, inputs=X)
    assert small.images is not None
    for other in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
        assert torch.equal(other.images.join().args[0], small.images.join().args[0])
