"""Atomic writes: the target is the old content or the new, and an error leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from intrafusion.errors import FolderError
from intrafusion.io import atomic
from intrafusion.io.atomic import atomic_file, atomic_folder


def tree(folder: Path) -> dict[str, str]:
    """Every file under a folder, hidden ones too, with its content; empty folders end in a slash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file():
            found[name] = path.read_text()
        elif not any(path.iterdir()):
            found[name + "/"] = ""
    return found


def has_plan(folder: Path) -> bool:
    return (folder / "plan.json").exists()


def test_a_file_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "table.md"
    with atomic_file(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".md"
    assert tree(tmp_path) == {"table.md": "new"}


def test_a_file_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "table.md"
    target.write_text("old")
    with atomic_file(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert tree(tmp_path) == {"table.md": "new"}


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt("mine")])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "table.md"
    target.write_text("old")
    with pytest.raises(type(error), match="mine"), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise error
    assert tree(tmp_path) == {"table.md": "old"}


def test_parents_are_made_and_removed_again_on_an_error(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "table.md"
    with pytest.raises(ValueError, match="mine"), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise ValueError("mine")
    assert tree(tmp_path) == {}
    with atomic_file(target) as temporary:
        temporary.write_text("new")
    assert tree(tmp_path) == {"a/b/table.md": "new"}


def test_parents_that_others_filled_meanwhile_stay(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), atomic_file(tmp_path / "a" / "table.md"):
        (tmp_path / "a" / "other").write_text("theirs")
        raise ValueError("mine")
    assert tree(tmp_path) == {"a/other": "theirs"}


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="expected the name of a file, but this is a folder"), atomic_file(tmp_path):
        pass


def test_a_linked_file_is_written_through_the_link(tmp_path: Path) -> None:
    (tmp_path / "real.md").write_text("old")
    (tmp_path / "link.md").symlink_to("real.md")
    with atomic_file(tmp_path / "link.md") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.md").is_symlink()
    assert (tmp_path / "real.md").read_text() == "new"


def test_the_content_is_on_disk_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("replace"), replace(old, new)))
    with atomic_file(tmp_path / "table.md") as temporary:
        temporary.write_text("new")
    assert events == ["fsync", "replace", "fsync"]


def test_a_folder_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "small"
    with atomic_folder(target, ours=has_plan) as temporary:
        (temporary / "plan.json").write_text("{}")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "weights").write_text("w")
        assert not target.exists()
    assert tree(tmp_path) == {"small/plan.json": "{}", "small/sub/weights": "w"}


def test_our_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "small"
    target.mkdir()
    (target / "plan.json").write_text("old")
    (target / "stale").write_text("old")
    with atomic_folder(target, ours=has_plan) as temporary:
        (temporary / "plan.json").write_text("new")
        assert tree(target) == {"plan.json": "old", "stale": "old"}
    assert tree(tmp_path) == {"small/plan.json": "new"}


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    with atomic_folder(tmp_path / "small", ours=has_plan) as temporary:
        (temporary / "plan.json").write_text("new")
    assert tree(tmp_path) == {"small/plan.json": "new"}


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "small"
    target.mkdir()
    (target / "plan.json").write_text("old")
    with pytest.raises(ValueError, match="mine"), atomic_folder(target, ours=has_plan) as temporary:
        (temporary / "plan.json").write_text("half")
        raise ValueError("mine")
    assert tree(tmp_path) == {"small/plan.json": "old"}


def test_a_foreign_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "chapter").write_text("precious")
    refusal = pytest.raises(FolderError, match="thesis: this folder holds files that intrafusion did not write")
    with refusal, atomic_folder(target, ours=has_plan):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == {"thesis/chapter": "precious"}


def test_a_folder_that_became_foreign_meanwhile_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "small"
    with pytest.raises(FolderError, match="did not write"), atomic_folder(target, ours=has_plan) as temporary:
        (temporary / "plan.json").write_text("new")
        target.mkdir()
        (target / "chapter").write_text("precious")
    assert tree(tmp_path) == {"small/chapter": "precious"}


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "small").write_text("precious")
    refusal = pytest.raises(FolderError, match="expected the name of a folder, but this is a file")
    with refusal, atomic_folder(tmp_path / "small", ours=lambda folder: True):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == {"small": "precious"}


def test_the_old_folder_is_put_back_if_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "small"
    target.mkdir()
    (target / "plan.json").write_text("old")
    rename = os.rename

    def failing(old: Path, new: Path) -> None:
        if (old / "new").exists():
            raise OSError("disk is gone")
        rename(old, new)

    monkeypatch.setattr(atomic.os, "rename", failing)
    with pytest.raises(OSError, match="disk is gone"), atomic_folder(target, ours=has_plan) as temporary:
        (temporary / "new").write_text("new")
    assert tree(tmp_path) == {"small/plan.json": "old"}
