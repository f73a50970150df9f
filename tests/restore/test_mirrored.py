"""restore="mirrored": mirror images of those given, where held-out images say that they help."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import intrafusion
from intrafusion import Compressed, ModelError
from intrafusion.network.input_batches import read_input_batches
from intrafusion.network.tensors import named_tensors
from intrafusion.restore import LeastSquares, steps
from intrafusion.restore.mirrored import add_mirrored

X = torch.zeros(1, 3, 8, 8)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    ).eval()  # fmt: skip


def draw(count: int, seed: int = 1, *, either_way: bool = True) -> Tensor:
    """Images brighter on one side, which is the left one or, half of the time, the right one."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 8, 8, generator=generator) + torch.linspace(3, -3, 8)
    turned = torch.rand(count, 1, 1, 1, generator=generator) < (0.5 if either_way else 0.0)
    return torch.where(turned, images.flip(-1), images)


def compress(images: Any, **options: Any) -> Compressed:
    return intrafusion.compress(network(), X, 0.5, inputs=images, progress=False, **{"restore": "mirrored", **options})


def note_of(small: Compressed) -> str:
    (step,) = small.restored
    return step.note or ""


def test_mirror_images_stand_behind_all_images_in_order() -> None:
    images = draw(10)
    batches = read_input_batches([images[:4], images[4:]], network())
    whole = add_mirrored(batches, network()).join().tensors()[0]
    torch.testing.assert_close(whole, torch.cat([images, images.flip(-1)]))


def test_where_they_help_layers_are_solved_on_both_and_it_is_said() -> None:
    images = draw(260)
    small, alone = compress(images), compress(images, restore="images")
    assert "mirror images too" in note_of(small)
    (step,), (other,) = small.restored, alone.restored
    assert step.error_after is not None
    assert other.error_after is not None
    assert step.error_after < other.error_after
    assert small.comparison is not None
    assert small.comparison.held_out is not None
    assert small.comparison.held_out.after.error == step.error_after


def test_where_they_do_harm_the_layers_are_as_without_to_the_bit() -> None:
    images = draw(260, either_way=False)
    small, alone = compress(images), compress(images, restore="images")
    assert "mirror images left out" in note_of(small)
    others = named_tensors(alone.model)
    assert all(torch.equal(t, others[name]) for name, t in named_tensors(small.model).items())


def test_what_is_solved_with_them_is_what_images_and_mirror_images_give(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    solve = LeastSquares.restore

    def watch(self: LeastSquares, *args: Any) -> Any:
        seen.append(args[3].join().tensors()[0])
        return solve(self, *args)

    monkeypatch.setattr(LeastSquares, "restore", watch)
    compress(draw(260))
    first, second = seen
    torch.testing.assert_close(second, torch.cat([first, first.flip(-1)]))


def test_where_images_alone_were_undone_it_is_not_said_of_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = steps._solve_or_undo
    harmed = lambda *args: replace(solve(*args), undone=True, note="undone, as the outputs were worse")  # noqa: E731
    monkeypatch.setattr(steps, "_solve_or_undo", harmed)
    (step,) = compress(draw(260)).restored
    assert not step.undone
    assert (step.note or "").startswith("mirror images too")


def test_few_images_held_out_cannot_tell() -> None:
    assert "20 images held out are too few to tell whether they help; 50 are enough" in note_of(compress(draw(100)))


def test_what_has_no_mirror_image_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.zeros(1, 6)
    with pytest.raises(ModelError, match=r'restore="mirrored": expected images.*\(\d+, 6\).*say "images"'):
        intrafusion.compress(model, x, 0.5, inputs=torch.randn(260, 6), restore="mirrored", progress=False)
    with pytest.raises(ModelError, match='restore="mirrored": expected images=, got none'):
        intrafusion.compress(network(), X, 0.5, restore="mirrored", progress=False)
