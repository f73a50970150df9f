"""Calibration images in whatever form they come, as one call of the network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from intrafusion.arguments import check_by
from intrafusion.errors import IntrafusionError, ModelError, RecipeError, show
from intrafusion.network.inputs import Inputs
from intrafusion.network.row_weights import RowWeights, find_weights

ImagesLike = Tensor | np.ndarray | Mapping[str, Any] | Inputs | Iterable[Any]
"""A batch of images (n, ...), a dict of keyword arguments, or any iterable of batches, such as a DataLoader.

NumPy arrays may stand for tensors; an object with `images` and `labels`, as the zoo reads them, is one batch.
"""

T = TypeVar("T")


def read_batches(images: ImagesLike) -> list[Inputs]:
    """One call of the network per batch.

    A batch is a tensor, a dict of keyword arguments, or a tuple or list whose first entry is the input: what follows it
    (labels) is dropped. A network of several inputs takes dicts, or `Inputs`.

    >>> images = [(torch.zeros(2, 3), torch.tensor([0, 1])), (torch.zeros(1, 3), torch.tensor([1]))]
    >>> list(map(str, read_batches(images)))
    ['(float32[2, 3])', '(float32[1, 3])']

    Raises:
        ModelError: no batch, or something else among them.
    """
    return [call for call, _ in read_labelled(images)]


def read_labelled(images: ImagesLike) -> Iterator[tuple[Inputs, Tensor | None]]:
    """One call of the network per batch and the labels that came with it, read one batch at a time.

    Labels are the second entry of a tuple or list, or a dict's "labels" (which stay among the arguments), where that is
    a tensor.

    Raises:
        ModelError: no batch, or something else among them.
    """
    if isinstance(images, (Tensor, Mapping, Inputs, np.ndarray)):
        yield as_call(images), _labels_of(images)
        return
    if isinstance(
        pair := getattr(images, "images", None), Tensor
    ):  # images and their labels as one object, as `zoo.Images`
        yield as_call(pair), _labels_of((pair, getattr(images, "labels", None)))
        return
    check_images_like(images)
    index = -1
    with reading(_read(images)) as batches:
        for index, batch in enumerate(batches):
            yield as_call(batch, f"batch {index} of images"), _labels_of(batch)
    if index < 0:
        raise ModelError("images: expected at least one batch, got none; a generator can be read only once.")


@contextlib.contextmanager
def reading(batches: Iterable[T]) -> Iterator[Iterator[T]]:
    """An iterator over them that is closed when this is left, with the workers of a loader.

    Else Python closes it when it lets go of it, and an interrupt that comes meanwhile is lost: workers take their time.
    """
    iterator = iter(batches)
    try:
        yield iterator
    finally:
        close: Any = getattr(iterator, "close", None)
        if close is None and not getattr(batches, "persistent_workers", False):
            close = getattr(iterator, "_shutdown_workers", None)  # of a DataLoader with workers
        if close is not None:
            close()


def check_images_like(images: Any) -> None:
    """
    Raises:
        ModelError: something that holds no images, whatever is in it.
    """
    is_read = isinstance(images, (Tensor, Inputs, Iterable)) or isinstance(getattr(images, "images", None), Tensor)
    if not is_read or isinstance(images, (str, bytes, type)):
        advice = "put a DataLoader around a data set" if hasattr(images, "__getitem__") else "pass the images"
        if isinstance(images, str):
            advice = "read files into tensors, such as by a DataLoader; texts go in a list, with a tokenizer="
        raise ModelError(f"images: expected a tensor, a dict or an iterable of batches, got {show(images)}; {advice}.")


check_by(ImagesLike, check_images_like)


def _read(images: Iterable[Any]) -> Iterator[Any]:
    """The batches; what fails while they are read is told with the number of the batch."""
    index, modes = 0, _see_modes()
    try:
        with reading(images) as batches:
            for batch in batches:
                with _set_modes(*modes) if _see_modes() != modes else contextlib.nullcontext():
                    yield batch
                index += 1
    except (IntrafusionError, GeneratorExit):
        raise
    except Exception as error:
        raise ModelError(
            f"images: batch {index} cannot be read: {type(error).__name__}: {error}; check the data set behind it."
        ) from error


def _see_modes() -> tuple[bool, bool]:
    return torch.is_inference_mode_enabled(), torch.is_grad_enabled()


@contextlib.contextmanager
def _set_modes(inference: bool, grad: bool) -> Iterator[None]:
    """A loader that gives its batches from inside `torch.inference_mode` has that on while they are used, too."""
    with torch.inference_mode(inference), torch.set_grad_enabled(grad):
        yield


def _labels_of(batch: Any) -> Tensor | None:
    labels = None
    if isinstance(batch, Inputs):
        labels = batch.labels
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        labels = batch[1]
    elif isinstance(batch, Mapping):
        labels = batch.get("labels")
    labels = torch.from_numpy(labels) if isinstance(labels, np.ndarray) and labels.dtype != object else labels
    return labels if isinstance(labels, Tensor) else None


def as_call(batch: Any, source: str = "images") -> Inputs:
    try:
        call = _as_call(batch, source)
    except RecursionError as error:
        raise ModelError(f"{source}: expected tensors, got some that are nested too deeply; unpack them.") from error
    for tensor in call.tensors():
        if tensor.is_meta:
            raise ModelError(f"{source}: expected tensors with values, got {show(tensor)} on meta; load them first.")
    return call if call.weights is not None else replace(call, weights=find_weights(call.kwargs or {}, source))


def _as_call(batch: Any, source: str) -> Inputs:
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], (Tensor, Mapping, np.ndarray)):
        batch = batch[0]
    if isinstance(batch, Inputs):
        return replace(batch, source=source) if batch.source == Inputs.source else batch
    if isinstance(batch, (Tensor, Mapping, np.ndarray)):
        return replace(Inputs.of(_tensors(batch, source)), source=source)
    if isinstance(batch, str) or (isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], str)):
        raise ModelError(
            f"{source}: expected tensors, got text {show(batch)}; pass what tokenizer(texts, padding=True, "
            "truncation=True, return_tensors='pt') gives, or a tokenizer= where that is an argument."
        )
    raise ModelError(
        f"{source}: expected batches that are a tensor, a dict, or a tuple that starts with one, "
        f"got {show(batch)}; {_advise_on(batch)}."
    )


def _advise_on(batch: Any) -> str:
    if type(batch).__module__.partition(".")[0] == "PIL":
        return "make normalised tensors of pictures, as in training, and put a DataLoader around them"
    return "unpack what is around it"


def _tensors(value: Any, source: str) -> Any:
    """NumPy arrays as tensors, also in dicts, tuples and lists."""
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(value.copy())
        except TypeError as error:
            raise ModelError(f"{source}: expected arrays of numbers, got one of {value.dtype}.") from error
    if isinstance(value, Mapping):
        return {key: _tensors(item, source) for key, item in value.items()}
    return type(value)(_tensors(item, source) for item in value) if type(value) in (tuple, list) else value


def join_batches(calls: list[Inputs]) -> Inputs:
    """All batches as one: tensors are concatenated along their first dimension, other arguments are the first batch's.

    Raises:
        ModelError: batches of different arguments or shapes.
    """
    flat = [tree_flatten((call.args, dict(call.kwargs or {}))) for call in calls]
    form = flat[0][1]
    if any(other != form for _, other in flat[1:]):
        raise ModelError("images: expected the same arguments in every batch, got different ones.")
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    args, kwargs = tree_unflatten([_concatenate_column(column) for column in columns], form)
    source = calls[0].source if len(calls) == 1 else "images"
    labels, weights = _join_labels([call.labels for call in calls]), _join_weights(calls)
    return replace(calls[0], args=args, kwargs=kwargs, source=source, labels=labels, weights=weights)


def _join_labels(labels: list[Tensor | None]) -> Tensor | None:
    """None where batches have none, or such as do not go together."""
    found = [t for t in labels if t is not None and t.dim()]
    alike = len(found) == len(labels) and len({(t.dtype, t.device, t.shape[1:]) for t in found}) == 1
    return torch.cat(found) if alike else None


def _join_weights(calls: list[Inputs]) -> RowWeights | None:
    parts = [call.weights for call in calls if call.weights is not None]
    if len(parts) < len(calls):
        return None
    tables = tuple(map(torch.cat, zip(*(weights.tables for weights in parts), strict=True)))
    shared = all(w.lost is parts[0].lost for w in parts)  # of calls of the same images: what is noted there is told
    return RowWeights(tables, parts[0].lost if shared else set[str]().union(*(w.lost for w in parts)))


def _concatenate_column(column: tuple[Any, ...]) -> Any:
    if not isinstance(column[0], Tensor) or column[0].dim() == 0 or len(column) == 1:
        return column[0]
    shapes = sorted({tuple(t.shape[1:]) for t in column})
    if len(shapes) > 1 and not column[0].is_floating_point():
        raise ModelError(
            f"images: expected sequences of one length in all batches, got {shapes[:3]}; pad them together: "
            "tokenizer(texts, padding='max_length', max_length=..., return_tensors='pt'), whose attention_mask says "
            "what does not count."
        )
    if len(shapes) > 1:
        raise ModelError(f"images: expected batches of one shape, got {shapes[:3]}; resize, crop or pad them first.")
    return torch.cat(column)


def cast_like(inputs: Inputs, model: nn.Module) -> Inputs:
    """The same call on the device of the network, floating tensors in its precision."""
    tensors = [*model.parameters(), *model.buffers()]
    floating = [t for t in tensors if t.is_floating_point()]
    if not tensors:
        return inputs
    device, dtype = tensors[0].device, floating[0].dtype if floating else None
    return inputs.map(lambda t: t.to(device, dtype if t.is_floating_point() else None))


def channels_last(images: Tensor) -> Tensor:
    """The same images in the memory layout in which convolutions run, and a place's channels are read, the fastest."""
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


def is_held(images: ImagesLike) -> bool:
    """Whether whoever gave them has them in memory, or they can be read only once."""
    whole = isinstance(images, (Tensor, np.ndarray, Mapping, Inputs, Sequence, Iterator)) or hasattr(images, "images")
    return bool(getattr(images, "is_held", whole))


def make_reusable(images: T) -> T | list[Any]:
    """Images that can be read more than once: an iterator is read into a list."""
    return list(_read(images)) if isinstance(images, Iterator) else images


# ---- batches of one size --------------------------------------------------------------------------------------------


def check_batch(size: int) -> None:
    """For what takes a variance over a batch."""
    if size < 2:
        raise RecipeError(f"batch: expected at least 2 images, a variance of one is 0; got {size!r}.")


def rebatch(images: ImagesLike, size: int) -> Iterator[Inputs]:
    """Calls of about `size` images, never of one alone where there are more.

    One batch is held at a time, with what is left over of the one before; texts of another length are not put to it.
    """
    left: Inputs | None = None
    for call, _ in read_labelled(images):
        if left is not None and _are_of_lengths(left, call):
            yield left
            left = None
        left = call if left is None else join_batches([left, call])
        while count_images(left) > size + 1:
            yield take_images(left, 0, size)
            left = take_images(left, size, count_images(left))
    if left is not None:
        yield left


def _are_of_lengths(a: Inputs, b: Inputs) -> bool:
    """Whether two batches are of sequences that differ in their length."""
    pairs = list(zip(a.tensors(), b.tensors(), strict=False))
    whole = any(not s.is_floating_point() for s, _ in pairs)
    return whole and len(a.tensors()) == len(b.tensors()) and any(s.shape[1:] != t.shape[1:] for s, t in pairs)


def count_images(call: Inputs) -> int:
    """Images in a batch: the length of the first dimension of its first tensor."""
    tensors = [t for t in call.tensors() if t.dim()]
    return len(tensors[0]) if tensors else 1


def name_inputs(call: Inputs) -> str:
    """What a batch is of, in the plural."""
    first = next((t for t in call.tensors() if t.dim()), None)
    return "sequences" if first is not None and first.dtype in (torch.int32, torch.int64) else "images"


def take_images(call: Inputs, start: int, stop: int) -> Inputs:
    """Images of a batch that follow one another, from `start` to before `stop`."""
    return pick_images(call, torch.arange(start, min(stop, count_images(call))))


def pick_images(call: Inputs, places: Tensor) -> Inputs:
    """These images of a batch, labels with them; what is not one per image stays, and what is sparse.

    Where they follow one another they share their memory with it.
    """
    total, first = count_images(call), int(places[0]) if len(places) else 0
    is_run = torch.equal(places.cpu(), torch.arange(first, first + len(places)))

    def take(t: Tensor) -> Tensor:
        return t[first : first + len(places)] if is_run else t[places.to(t.device)]

    def pick(value: object) -> object:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return value
        return take(value) if value.dim() > 0 and len(value) == total else value

    labels = None if call.labels is None else take(call.labels)
    weights = None if call.weights is None else call.weights.map(take)
    parts = tree_map(pick, call.args), tree_map(pick, call.kwargs)
    return replace(call, args=parts[0], kwargs=parts[1], labels=labels, weights=weights)


def cut_call(call: Inputs, size: int) -> list[Inputs]:
    """The same images in calls of at most `size`, about as many in each.

    >>> [count_images(part) for part in cut_call(Inputs.of(torch.zeros(10, 3)), 4)]
    [4, 3, 3]
    """
    return [pick_images(call, places) for places in share_out(torch.arange(count_images(call)), size)]


def share_out(places: Tensor, size: int) -> tuple[Tensor, ...]:
    """Neighbours together, in as few parts of at most `size` as there can be, about as many in each."""
    return places.tensor_split(max(1, -(-len(places) // size)))


def double_first(call: Inputs) -> Inputs:
    """A call whose rows count differently, with its first sample once more at the end, without weight.

    By that it is seen in which order rows lie; see `row_weights`. Twice where samples were as many as positions then.
    """
    weights = call.weights
    if weights is None or not weights.tables or weights.doubled:
        return call
    total = count_images(call)
    count = next(k for k in (1, 2, 3) if all(table.shape[1] != total + k for table in weights.tables))

    def extend(value: Any) -> Any:
        batched = isinstance(value, Tensor) and value.dim() > 0 and len(value) == total
        return torch.cat([value, *[value[:1]] * count]) if batched else value

    tables = tuple(torch.cat([t, t.new_zeros(count, t.shape[1])]) for t in weights.tables)
    extended = replace(weights, tables=tables, doubled=count)
    return replace(call, args=tree_map(extend, call.args), kwargs=tree_map(extend, call.kwargs), weights=extended)
