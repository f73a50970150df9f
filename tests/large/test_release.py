"""Objects are passed over by collections for a run alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from intrafusion.large.release import only_new_collected, release_memory


class Circle:
    def __init__(self) -> None:
        self.own = self


@pytest.fixture
def thawed() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.freeze()


def test_what_came_after_the_start_is_collected_and_what_was_there_again_at_the_end(thawed: None) -> None:
    old = Circle()
    seen = weakref.ref(old)
    with pytest.raises(KeyboardInterrupt), only_new_collected():
        del old
        new = weakref.ref(Circle())
        release_memory()
        assert new() is None
        assert seen() is not None
        raise KeyboardInterrupt
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert seen() is None


def test_what_nothing_referred_to_before_the_start_goes(thawed: None) -> None:
    gc.disable()
    try:
        seen = weakref.ref(Circle())
        with only_new_collected():
            assert seen() is None
    finally:
        gc.enable()


def test_what_a_program_froze_itself_stays_frozen() -> None:
    gc.freeze()
    with only_new_collected():
        release_memory()
    assert gc.get_freeze_count() > 0
