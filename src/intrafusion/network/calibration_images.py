"""Calibration images as calls like the example inputs: checked, named by batch, labels set apart."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from intrafusion.brief import show_briefly
from intrafusion.errors import ArgumentError, IntrafusionWarning, ModelError, show
from intrafusion.names import name_some
from intrafusion.network.batches import (
    ImagesLike,
    as_call,
    count_images,
    is_held,
    make_reusable,
    read_labelled,
    reading,
)
from intrafusion.network.images_first import put_images_first
from intrafusion.network.inputs import Inputs
from intrafusion.network.row_weights import find_unknown_masks, find_weights
from intrafusion.network.texts import Shift, Tokenizer, find_shift, is_text, list_texts, tokenize
from intrafusion.network.token_limits import TokenLimits, find_token_limits

_FEW = 32  # images, below which a layer is solved for the images themselves rather than for what they stand for
_SAMPLE = 64  # images that are looked at
_PICTURES, _COLOURS = 4, 4  # dimensions of a batch of pictures, and the most channels that pictures have


_DECODER = "decoder_input_ids"
_LABELS = ("labels", "label")  # of arguments


@dataclass(eq=False)
class Calls:
    """Batches of images, one call of the network each; as often as the images can be read.

    Attributes:
        given: the images as they came.
        like: the example inputs, which say how many arguments a call has, and of which kind.
        forward: names of the arguments that the network takes; None for any.
        names: of positional arguments, in order.
        limits: which tokens the network takes.
        tokenizer: for texts.
        notes: what the user should know, once all batches were read.
        sample: the first of the batches that were read, with a few dozen images.
        lost: where rows of padded tokens could not be told from others, once the calls were used.
        turned: arguments of which the images run along the second dimension; see `images_first`.
        shift: what a decoder reads of texts.
    """

    given: ImagesLike
    like: Inputs
    forward: tuple[str, ...] | None
    names: tuple[str, ...] = ()
    limits: TokenLimits = field(default_factory=TokenLimits)
    tokenizer: Tokenizer | None = None
    notes: dict[str, str] = field(default_factory=dict)
    sample: list[Inputs] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)
    turned: tuple[int | str, ...] = ()
    shift: Shift | None = None
    _warned: set[str] = field(default_factory=set)

    __repr__ = show_briefly

    def __iter__(self) -> Iterator[Inputs]:
        total = 0
        with reading(read_labelled(self._opened())) as calls:
            for call, labels in calls:
                call = self._completed(call if call.labels is not None else replace(call, labels=labels))
                call = self._turned(self._checked(call))
                if total < _SAMPLE and sum(map(count_images, self.sample)) <= total:
                    self.sample.append(call)
                total += count_images(call)
                yield self._weighed(call)
        if total < _FEW:
            self.notes["few"] = (
                f"images: {total} are few for solving layers on them; give a few hundred, or restore='noise' or "
                "'synthetic', which need none"
            )

    @property
    def is_held(self) -> bool:
        """Whether all are in memory in any case."""
        return is_held(self.given)

    def warn(self) -> tuple[str, ...]:
        """All notes, after a warning of each that was not warned of before."""
        warn_of({k: note for k, note in self._said.items() if note not in self._warned})
        self._warned.update(self._said.values())
        return tuple(self._said.values())

    @property
    def _said(self) -> dict[str, str]:
        """The notes, and where padding was not told from the rest."""
        if not self.lost:
            return self.notes
        lost = (
            f"the mask of the inputs could not be told from the shape of what {len(self.lost)} places read or give, "
            f"where all rows count, padded ones too: {name_some(sorted(self.lost))}"
        )
        return {**self.notes, "lost": lost}

    def _completed(self, call: Inputs) -> Inputs:
        """With the switches of the example that it leaves out: they change what a forward does and returns."""
        like, there = self.like, len(call.args)
        rest = () if call.kwargs or any(map(_holds_tensors, like.args[there:])) else like.args[there:]
        given = {*(call.kwargs or {}), *self.names[: there + len(rest)]}
        switches = {k: v for k, v in self._by_name(like).items() if k not in given and not _holds_tensors(v)}
        if not rest and not switches:
            return call
        return replace(call, args=(*call.args, *rest), kwargs={**(call.kwargs or {}), **switches})

    def _by_name(self, call: Inputs) -> dict[str, Any]:
        """Its arguments, positional ones too."""
        return {**dict(zip(self.names, call.args, strict=False)), **(call.kwargs or {})}

    def _turned(self, call: Inputs) -> Inputs:
        """With the images first; labels that are not one for each of them are left out."""
        if call.turned or not self.turned:
            return call
        turned = call.turn(self.turned)
        labels = call.labels if call.labels is not None and len(call.labels) == count_images(turned) else None
        return replace(turned, labels=labels)

    def _weighed(self, call: Inputs) -> Inputs:
        """With what its masks say, positional ones too; outputs that matter are those of the example."""
        self.limits.check(call)
        if long := self.limits.doubt(call):
            self.notes["long"] = long
        named = self._by_name(call)
        weights = find_weights(named, call.source)
        if unknown := find_unknown_masks(named, count_images(call)):
            self.notes["masks"] = (
                f"{call.source}: {name_some(unknown)}: where this is a mask of padding, padded positions count like "
                "all others; wrap the network to take attention_mask (1 where a token is) or src_key_padding_mask "
                "(True where padding is)"
            )
        if weights is not None:
            self.lost |= weights.lost
            weights = replace(weights, lost=self.lost)
        return replace(call, weights=weights, outputs=self.like.outputs)

    def _opened(self) -> Any:
        self.given = make_reusable(self.given)
        if isinstance(self.given, (list, tuple)) and is_text(self.given):
            texts = list_texts(self.given)
            return [self._named(self._tokenize(texts), "inputs")]
        if isinstance(self.given, (Tensor, np.ndarray, Mapping, Inputs)) or self._is_one_call(self.given):
            return [self._call(self.given, "images")]
        self._tell_of_a_tuple(self.given)
        if hasattr(self.given, "images") or isinstance(self.given, (str, bytes)) or not hasattr(self.given, "__iter__"):
            return self.given
        return self._call_each(self.given)

    def _tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """With the texts for the decoder too, where the example has tokens for it and the tokenizer gives none.

        Those are one token longer, so that what is of which is told by its shape.
        """
        shift, cut = self.shift if _DECODER in self._shown else None, self.limits.cut
        found = tokenize(texts, self.tokenizer, cut - 1 if cut and shift else cut)
        if shift is None or _DECODER in found or "input_ids" not in found:
            return found
        self.notes["decoder"] = (
            "inputs: the decoder reads the texts too, each behind the token that it starts with; for pairs of texts, "
            "such as translations, pass dicts with input_ids and decoder_input_ids in Python"
        )
        more = {_DECODER: shift(found["input_ids"])}
        mask = found.get("attention_mask")
        if mask is not None and "decoder_attention_mask" in {*(self.forward or ()), *self.names}:
            more["decoder_attention_mask"] = torch.cat([torch.ones_like(mask[:, :1]), mask], 1)
        return {**found, **more}

    def _call_each(self, given: Iterable[Any]) -> Iterator[Any]:
        with reading(given) as batches:
            for index, batch in enumerate(batches):
                yield self._call(batch, f"batch {index} of images")

    def _is_one_call(self, given: Any) -> bool:
        """Whether a tuple is a call like the example, and labels or not: no entry could be a batch by itself."""
        like, many = self.like.tensors(), len(self.like.args) + len(self.like.kwargs or {})
        if type(given) is not tuple or not all(isinstance(value, (Tensor, np.ndarray)) for value in given):
            return False
        if (self.like.kwargs and many > 1) or len(like) < many or len(given) not in (max(2, many), many + 1):
            return False
        fits = all(_is_like(found, one) for found, one in zip(given, like, strict=False))
        alike = len({len(value) for value in given if value.ndim}) == 1
        return fits and alike and (many > 1 or not _is_like(given[1], like[0]))

    def _tell_of_a_tuple(self, given: Any) -> None:
        """Tensors of which each could be an argument, and each a batch."""
        count = len(given) if type(given) is tuple else 0
        tensors = count > 1 and all(isinstance(value, (Tensor, np.ndarray)) and value.ndim for value in given)
        if tensors and count <= len(self.names) and len({len(value) for value in given}) == 1:
            self.notes["tuple"] = (
                f"images: the tuple of {count} tensors was read as {count} batches, as the example inputs have one "
                f"argument; where they are {name_some(self.names[:count])} of one call, give the example all of them"
            )

    def _call(self, batch: Any, source: str) -> Any:
        """A tuple is cut into arguments and labels by the number of arguments in the example."""
        if isinstance(batch, Mapping):
            return self._named(batch, source)
        if isinstance(batch, (tuple, list)) and isinstance(batch[0] if batch else None, (Mapping, Inputs)):
            return batch
        if isinstance(batch, (Tensor, np.ndarray)):
            return self._alone(batch, None, source)
        if not isinstance(batch, (tuple, list)):
            return batch
        wanted = len(self.like.args)
        if wanted < 2:
            self._tell_of_labels(batch)
            return self._alone(batch, batch[1] if len(batch) > 1 else None, source)
        if len(batch) < wanted:
            raise ModelError(
                f"{source}: expected {wanted} arguments as in the example inputs, and labels or not, got {len(batch)}."
            )
        labels = batch[wanted] if len(batch) > wanted and isinstance(batch[wanted], Tensor) else None
        given = [as_call(item, source).args[0] if isinstance(item, np.ndarray) else item for item in batch[:wanted]]
        return Inputs(tuple(given), None, source, labels)

    def _alone(self, batch: Any, labels: Any, source: str) -> Any:
        """One tensor, or a tuple that starts with one, for a network that was shown one: by the name it was shown by.

        Raises:
            ModelError: it was shown more.
        """
        names = [name for name, value in (self.like.kwargs or {}).items() if isinstance(value, Tensor)]
        shown = [value for value in self.like.args if isinstance(value, Tensor)]
        if len(names) + len(shown) > 1:
            got = "a tuple" if isinstance(batch, (tuple, list)) else f"{show(batch)} alone"
            if not shown:
                raise ModelError(f"{source}: expected a dict with {', '.join(names)} as in the example, got {got}.")
            raise ModelError(
                f"{source}: expected {len(names) + len(shown)} arguments as in the example inputs, got {got}; a batch "
                "is a tuple of them, and batches go in a list: [(a, b), ...]."
            )
        first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if shown or not names or not isinstance(first, (Tensor, np.ndarray)):
            return batch
        return replace(as_call({names[0]: first}, source), labels=labels if isinstance(labels, Tensor) else None)

    def _tell_of_labels(self, batch: Sequence[Any]) -> None:
        """What was taken for labels, and looks like another argument."""
        arrays = [value for value in batch[:2] if isinstance(value, (Tensor, np.ndarray))]
        alike = len(arrays) == 2 and arrays[0].shape == arrays[1].shape
        if alike and len(self.names) > 1 and self.names[1] not in _LABELS:
            self.notes["second"] = (
                "images: of each batch the first entry was given to the network, and the second was taken for labels, "
                f"as the example inputs have one argument; where it is {self.names[1]}, give it in the example too"
            )

    def _named(self, batch: Mapping[str, Any], source: str) -> Inputs:
        """Entries that forward does not take (a label, a path) are left out."""
        lists = [str(name) for name, value in batch.items() if isinstance(value, list)]
        if lists and not any(isinstance(value, (Tensor, np.ndarray)) for value in batch.values()):
            raise ModelError(
                f"{source}: expected tensors in a dict, got lists in {name_some(lists)}; pass what "
                "tokenizer(texts, padding=True, truncation=True, return_tensors='pt') gives."
            )
        labels = next((t for k in _LABELS if isinstance(t := batch.get(k), Tensor)), None)
        taken = {k: v for k, v in batch.items() if self.forward is None or k in self.forward}
        missing = [k for k, value in (self.like.kwargs or {}).items() if k not in taken and _holds_tensors(value)]
        if missing or not taken:
            takes = f"the arguments of forward ({', '.join(self.forward)})" if self.forward else ", ".join(missing)
            lost = f"; the example inputs have {name_some(missing)}: give it here too, or leave it out there"
            raise ModelError(
                f"{source}: expected a dict with {takes or 'arguments of forward'}, "
                f"got the keys {', '.join(map(str, batch))}{lost if missing else ''}."
            )
        more = [k for k in taken if k not in self._shown and k not in _LABELS and "mask" not in k]
        if more and self._shown:
            self.notes["more"] = (
                f"images: {name_some(more)}: given to the network too, which was inspected without, as the example "
                "inputs have none; put it there as well, or leave it out here"
            )
        return replace(as_call(taken, source), labels=labels)

    @property
    def _shown(self) -> set[str]:
        """Names of the arguments in the example; empty where they are not known."""
        if len(self.like.args) > len(self.names):
            return set()
        return {*(self.like.kwargs or {}), *self.names[: len(self.like.args)]}

    def _checked(self, call: Inputs) -> Inputs:
        pairs = list(zip(call.tensors(), self.like.tensors(), strict=False))
        for found, like in pairs:
            self._check(found, like, call.source)
        return call.map(lambda t: self._as_float(t, pairs, call.source))

    def _check(self, found: Tensor, like: Tensor, where: str) -> None:
        shown = f"got {str(found.dtype)[6:]}{list(found.shape)} where the example inputs have {list(like.shape)}"
        alone = found.dim() == like.dim() - 1 and (found.shape == like.shape[1:] or like.dim() == _PICTURES)
        if alone:
            raise ModelError(
                f"{where}: expected a batch, {shown}: that is one image alone; "
                "put a DataLoader around the data set, or stack the images."
            )
        if found.dim() == like.dim() == _PICTURES and found.shape[1] != like.shape[1] == found.shape[3] <= _COLOURS:
            raise ModelError(
                f"{where}: expected channels where the example inputs have them, {shown}: they are last here; "
                "images.permute(0, 3, 1, 2), or .transpose(0, 3, 1, 2) of an array, puts them there."
            )
        if found.dim() and len(found) == 0:
            raise ModelError(f"{where}: expected at least one image, {shown}.")
        if found.is_floating_point() and not like.is_floating_point():
            raise ModelError(f"{where}: expected {str(like.dtype)[6:]} as in the example inputs, {shown}.")
        broken = found.is_floating_point() and not bool(torch.isfinite(found).all())
        if broken and bool(torch.isfinite(like).all()):
            raise ModelError(
                f"{where}: expected finite images, got NaN or infinity in {list(found.shape)}; look at them."
            )

    def _as_float(self, t: Tensor, pairs: list[tuple[Tensor, Tensor]], where: str) -> Tensor:
        like = next((like for found, like in pairs if found is t), None)
        if like is None or not like.is_floating_point() or t.is_floating_point() or t.is_complex():
            return t
        self.notes["scale"] = (
            f"{where}: {str(t.dtype)[6:]} where the example inputs are {str(like.dtype)[6:]}; taken as numbers up to "
            f"{int(t.max())}: normalise images as the network was trained on them"
        )
        return t.to(like.dtype)


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, (Tensor, np.ndarray)) for leaf in tree_leaves(value))


def _is_like(found: Tensor | np.ndarray, like: Tensor) -> bool:
    """Whether it may be the same argument, of another number of images."""
    floating = found.is_floating_point() if isinstance(found, Tensor) else found.dtype.kind == "f"
    return found.ndim == like.dim() and floating == like.is_floating_point()


def as_calls(
    images: ImagesLike | None, model: nn.Module, like: Inputs, tokenizer: Tokenizer | None = None
) -> Calls | None:
    """The images as calls of a network.

    Args:
        tokenizer: for texts; see `texts`.
    """
    if images is None or isinstance(images, Calls):
        return images
    limits = find_token_limits(model, like)
    turned = put_images_first(like, model).turned
    return Calls(
        images,
        like,
        _arguments(model),
        _list_positional(model),
        limits,
        tokenizer,
        turned=turned,
        shift=find_shift(model),
    )


def choose_inputs(inputs: ImagesLike | None, images: ImagesLike | None) -> ImagesLike | None:
    """What was given by either name of the same argument.

    Raises:
        ArgumentError: both were.
    """
    if inputs is not None and images is not None:
        raise ArgumentError(
            "inputs: expected inputs= or images=, which are two names of one argument, got both; leave one out."
        )
    return images if inputs is None else inputs


def _list_positional(model: nn.Module) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def _arguments(model: nn.Module) -> tuple[str, ...] | None:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return tuple(p.name for p in parameters if p.kind is not p.VAR_POSITIONAL)


def warn_of(notes: Mapping[str, str]) -> tuple[str, ...]:
    """The notes, after a warning of each that points at the caller of the library."""
    for note in notes.values():
        warn_caller(note)
    return tuple(notes.values())


def warn_caller(message: str) -> None:
    """An IntrafusionWarning that points at the caller of the library."""
    warnings.warn(message, IntrafusionWarning, stacklevel=_depth())


def _depth() -> int:
    """How many frames up the first one outside the library lies."""
    frame, depth = inspect.currentframe(), 0
    while (
        frame is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] == __name__.partition(".")[0]
    ):
        frame, depth = frame.f_back, depth + 1
    return depth
