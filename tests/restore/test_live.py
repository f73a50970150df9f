"""What a pass has made and still holds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion.restore.live import LiveTensors


def sizes(live: LiveTensors) -> list[int]:
    return sorted(storage.nbytes() // 4 for storage in live.list_storages())


def test_what_was_made_inside_and_is_still_there() -> None:
    before, layer = torch.randn(64, 128), nn.Linear(128, 256)
    read: list[Tensor] = []
    with torch.no_grad(), LiveTensors(read.extend) as live:
        a = layer(before)  # 64 * 256
        view = a.T[:7]
        b = F.relu(before.view(128, 64))  # 64 * 128
        a.add_(1.0)
        inside = before[:3], layer.weight.T  # memory that was there
        gone = a + 1
        del gone
        small = torch.zeros(7)
    assert sizes(live) == [64 * 128, 64 * 256]
    assert live.count_bytes() == 4 * (64 * 128 + 64 * 256)
    assert any(t is before for t in read)
    read.clear()
    del a
    assert sizes(live) == [64 * 128, 64 * 256]  # the view holds it
    del view
    assert sizes(live) == [64 * 128]
    del b, inside, small
    assert sizes(live) == []


def test_what_numpy_looks_at_cannot_be_emptied() -> None:
    with LiveTensors(lambda _: None) as live:
        x = torch.zeros(10_000)
        array = x.numpy()
    assert sizes(live) == []
    assert array.shape == (10_000,)


def test_what_was_made_out_of_sight_is_noted() -> None:
    x = torch.zeros(10_000)
    live = LiveTensors(lambda _: None)
    live.note(x)
    live.note(torch.zeros(3))
    assert sizes(live) == [10_000]
