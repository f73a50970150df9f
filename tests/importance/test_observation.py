from __future__ import annotations

import pytest

from intrafusion.graph import ChannelGroup
from intrafusion.importance import IMPORTANCES, NEEDS, Observation, ObservationError, get_importance, needs_of
from intrafusion.importance.observation import get_observed


class Warm:
    needs = frozenset({"temperature"})

    def __call__(self, group, weights, observations=None): ...


def plain(group, weights, observations=None): ...


def test_needs_are_declared_or_empty() -> None:
    assert needs_of(plain) == frozenset()
    assert all(needs_of(criterion) <= NEEDS.keys() for criterion in IMPORTANCES.values())
    with pytest.raises(ValueError, match="importance Warm: needs: unknown observation 'temperature'"):
        needs_of(Warm())


@pytest.mark.parametrize("name", [n for n, c in IMPORTANCES.items() if any(NEEDS[x] for x in needs_of(c))])
def test_every_criterion_on_images_names_itself_and_the_argument_where_it_gets_none(name: str) -> None:
    with pytest.raises(ObservationError) as raised:
        IMPORTANCES[name](ChannelGroup("conv", 2, ()), {})
    assert f"importance {IMPORTANCES[name]!r}: " in str(raised.value)
    assert "images=" in str(raised.value)


def test_what_could_not_be_seen() -> None:
    group = ChannelGroup("conv", 2, ())
    with pytest.raises(ObservationError, match="importance plain: group 'conv': no contributions were seen"):
        get_observed(Observation(), "contributions", plain, group)
    with pytest.raises(ObservationError, match="importance plain: group 'conv': expected an Observation"):
        get_observed(None, "contributions", plain, group)


def test_any_callable_passes_through() -> None:
    assert get_importance(plain) is plain
