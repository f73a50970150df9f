from __future__ import annotations

import numpy as np
import pytest
import torch

from intrafusion.graph import ChannelGroup
from intrafusion.importance import CHIP, Observation, ObservationError, chip
from intrafusion.importance.chip import channel_independence

GROUP = ChannelGroup("conv1", 7, ())


@pytest.mark.parametrize("places", [1, 5, 7, 30], ids=["one", "fewer", "as many", "more"])
def test_nuclear_norms_by_singular_values(places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.rand(3, 7, places)
    expected = np.zeros(7)
    for image in maps.double().numpy():
        for channel in range(7):
            masked = image.copy()
            masked[channel] = 0
            expected[channel] += (np.linalg.norm(image, "nuc") - np.linalg.norm(masked, "nuc")) / 3
    np.testing.assert_allclose(channel_independence(maps).numpy(), expected, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(chip, "CHUNK", 1)  # one channel at a time
    np.testing.assert_allclose(channel_independence(maps).numpy(), expected, rtol=1e-6, atol=1e-6)
    found = CHIP()(GROUP, {}, Observation(feature_maps=maps))
    np.testing.assert_allclose(found.numpy(), expected / expected.mean(), rtol=1e-5)


def test_a_channel_that_others_tell_matters_less_than_one_that_stands_alone() -> None:
    maps = torch.zeros(1, 4, 6)
    maps[0, 0, :3] = maps[0, 1, :3] = 1.0  # twins
    maps[0, 2, 3:] = 1.0  # alone; the last channel is dead
    score = channel_independence(maps)[:4].tolist()
    assert score[0] == pytest.approx(score[1])
    assert score[2] == pytest.approx(3**0.5)
    assert score[0] == pytest.approx(6**0.5 - 3**0.5)
    assert score[3] == pytest.approx(0.0, abs=1e-7)


def test_dead_maps_stay_finite() -> None:
    assert CHIP()(GROUP, {}, Observation(feature_maps=torch.zeros(2, 7, 9))).tolist() == [0.0] * 7


def test_errors() -> None:
    with pytest.raises(ObservationError, match=r"importance CHIP\(normalizer='mean'\): it looks at feature_maps"):
        CHIP()(GROUP, {})
    with pytest.raises(ObservationError, match="group 'conv1': no feature_maps were seen"):
        CHIP()(GROUP, {}, Observation())
    with pytest.raises(ValueError, match="unknown normalizer 'x'"):
        CHIP("x")
