"""Memory put away comes back as it was, within the bound, and a full disk says what to do."""

from __future__ import annotations

import errno
import os
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from intrafusion import ModelError
from intrafusion.restore.shelf import Shelf, find_bound


def make(count: int, size: int = 1000) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size + 10 * i, generator=generator) for i in range(count)]


def is_away(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == 0


def test_what_is_due_last_goes_away_and_comes_back() -> None:
    tensors = make(4)
    before, view = [t.clone() for t in tensors], tensors[3].view(-1, 2)[:, 1]
    shelf = Shelf(9000)
    for index, tensor in enumerate(tensors):
        shelf.lay(index, [tensor.untyped_storage()], -index if index == 2 else index)
    assert [is_away(t) for t in tensors] == [False, True, False, True]
    assert shelf.held <= 9000
    for index in range(4):
        shelf.take(index)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert torch.equal(view, before[3].view(-1, 2)[:, 1])
    assert shelf.held == 0
    shelf.close()


def test_any_order_of_laying_and_taking_gives_back_the_same_bytes() -> None:
    """Some thousand moves against copies; the file does not grow beyond what lies in it at once, and some gaps."""
    rng, tensors = random.Random(0), make(30, 500)
    copies, shelf, laid = [t.clone() for t in tensors], Shelf(20_000), set[int]()
    for step in range(2000):
        index = rng.randrange(30)
        if index not in laid:
            shelf.lay(index, [tensors[index].untyped_storage()], rng.random())
            laid.add(index)
        elif rng.random() < 0.5:
            shelf.ensure([tensors[index].untyped_storage()])
            assert torch.equal(tensors[index], copies[index]), step
        else:
            shelf.take(index)
            laid.discard(index)
            assert torch.equal(tensors[index], copies[index]), step
    assert shelf.file.end < 2 * sum(t.nbytes for t in copies)
    shelf.close()


def test_what_is_dropped_leaves_its_part_of_the_file_to_others() -> None:
    a, b = make(2)
    shelf = Shelf(0)
    shelf.lay("a", [a.untyped_storage()], 0)
    shelf.drop("a")
    shelf.lay("b", [b[:1000].clone().untyped_storage()], 0)
    assert shelf.file.end == 4000
    shelf.close()


@pytest.mark.parametrize("memory", [0, 2**20])
def test_what_is_renamed_lies_under_the_new_name(memory: int) -> None:
    tensor = make(1)[0]
    copy, shelf = tensor.clone(), Shelf(memory)
    shelf.lay("a", [tensor.untyped_storage()], 0)
    shelf.rename("a", "b")
    shelf.ensure([tensor.untyped_storage()])
    assert torch.equal(tensor, copy)
    assert list(shelf.items) == ["b"]
    shelf.take("b")
    assert (shelf.items, shelf.held) == ({}, 0)
    shelf.close()


def test_closing_gives_back_what_others_hold() -> None:
    kept, lost = make(2)
    copy = kept.clone()
    shelf = Shelf(0)
    shelf.lay("kept", [kept.untyped_storage()], 0)
    storage = lost.untyped_storage()
    del lost
    shelf.lay("lost", [storage], 0)
    del storage
    shelf.close()
    assert torch.equal(kept, copy)
    assert shelf.items == {}
    with pytest.raises(ValueError, match="closed"):
        os.fstat(shelf.file.handle.fileno())  # type: ignore[union-attr]


@pytest.mark.parametrize("written", [None, 100])
def test_a_full_disk_says_where_and_what_to_do(monkeypatch: pytest.MonkeyPatch, written: int | None) -> None:
    """Also where a write takes only a part, and the next none."""
    parts = iter([written, 0])

    def full(*_: Any) -> int:
        part = next(parts)
        if part is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return part

    tensor = make(1)[0]
    copy, shelf = tensor.clone(), Shelf(0)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ModelError, match=r"temporary file in .*: No space left on device; set TMPDIR"):
        shelf.lay("a", [tensor.untyped_storage()], 0)
    shelf.close()
    assert torch.equal(tensor, copy)


def test_a_bound_by_default_is_less_on_a_small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", values.__getitem__)
    assert find_bound() == 512_000
    assert (find_bound(12_000), find_bound(10**9)) == (500_000, 64_000)  # what the images take is a part of it
    values["SC_PHYS_PAGES"] = 10**9
    assert find_bound() == 2**27
