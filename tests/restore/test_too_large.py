"""What counts as out of memory, and how batches are cut then."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from intrafusion import IntrafusionWarning, ModelError, RecipeError
from intrafusion.network.batches import count_images, cut_call
from intrafusion.network.inputs import Inputs
from intrafusion.restore.too_large import TooLarge, check_size, is_out_of_memory


def call(n: int) -> Inputs:
    return Inputs((torch.randn(n, 3),))


def test_errors_of_devices_and_of_the_machine_also_where_they_are_told_by_another() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    told = ModelError("does not run")
    told.__cause__ = caught.value
    for error in (caught.value, told, torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        assert is_out_of_memory(error)
    for other in (RuntimeError("shapes"), ModelError("does not run"), None):
        assert not is_out_of_memory(other)


@pytest.mark.parametrize(("need", "size"), [(1001, 7), (2000, 4), (90_000, 1)])
def test_as_many_images_as_fit(need: int, size: int) -> None:
    check_size(call(8), 1000, 1000)
    check_size(call(8), 10**9, None)
    with pytest.raises(TooLarge) as caught:
        check_size(call(8), need, 1000)
    with pytest.warns(IntrafusionWarning, match=f"got 1,000. Batches of 8 images are cut to {size}."):
        caught.value.check(nn.Linear(3, 2))
    assert max(map(count_images, caught.value.cut([call(8), call(3)]))) <= size


def test_one_image_is_not_cut() -> None:
    with pytest.raises(TooLarge) as caught:
        check_size(call(1), 2000, 1000)
    with pytest.raises(RecipeError, match="expected at least 2,000 bytes, which one image takes"):
        caught.value.check(nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("total", "size", "parts"), [(10, 4, [4, 3, 3]), (8, 4, [4, 4]), (3, 9, [3]), (5, 1, [1] * 5), (0, 4, [0])]
)
def test_parts_are_about_equal_and_in_order(total: int, size: int, parts: list[int]) -> None:
    whole = call(total)
    found = cut_call(whole, size)
    assert [count_images(part) for part in found] == parts
    assert torch.equal(torch.cat([part.args[0] for part in found]), whole.args[0])
