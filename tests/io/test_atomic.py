"""Atomic writes: the target is the old content or the new, and an error leaves nothing behind."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from intrafusion.errors import FolderError
from intrafusion.io import atomic, exchange, locks
from intrafusion.io.atomic import atomic_file, atomic_folder

NAMES = ("plan.json", "weights", "sub")


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
        assert temporary.parent.parent == tmp_path
        assert temporary.name == "table.md"
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
    with atomic_folder(target, ours=has_plan, names=NAMES) as temporary:
        (temporary / "plan.json").write_text("{}")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "weights").write_text("w")
        assert not target.exists()
    assert tree(tmp_path) == {"small/plan.json": "{}", "small/sub/weights": "w"}


def test_our_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "small"
    target.mkdir()
    (target / "plan.json").write_text("old")
    (target / "weights").write_text("old")
    with atomic_folder(target, ours=has_plan, names=NAMES) as temporary:
        (temporary / "plan.json").write_text("new")
        assert tree(target) == {"plan.json": "old", "weights": "old"}
    assert tree(tmp_path) == {"small/plan.json": "new"}


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    with atomic_folder(tmp_path / "small", ours=has_plan, names=NAMES) as temporary:
        (temporary / "plan.json").write_text("new")
    assert tree(tmp_path) == {"small/plan.json": "new"}


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "small"
    target.mkdir()
    (target / "plan.json").write_text("old")
    with pytest.raises(ValueError, match="mine"), atomic_folder(target, ours=has_plan, names=NAMES) as temporary:
        (temporary / "plan.json").write_text("half")
        raise ValueError("mine")
    assert tree(tmp_path) == {"small/plan.json": "old"}


def test_a_foreign_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "chapter").write_text("precious")
    refusal = pytest.raises(FolderError, match="thesis: this folder holds files that intrafusion did not write")
    with refusal, atomic_folder(target, ours=has_plan, names=NAMES):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == {"thesis/chapter": "precious"}


def test_a_folder_that_became_foreign_meanwhile_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "small"
    with (
        pytest.raises(FolderError, match="did not write"),
        atomic_folder(target, ours=has_plan, names=NAMES) as temporary,
    ):
        (temporary / "plan.json").write_text("new")
        target.mkdir()
        (target / "chapter").write_text("precious")
    assert tree(tmp_path) == {"small/chapter": "precious"}


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "small").write_text("precious")
    refusal = pytest.raises(FolderError, match="expected the name of a folder, but this is a file")
    with refusal, atomic_folder(tmp_path / "small", ours=lambda folder: True, names=NAMES):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == {"small": "precious"}


@pytest.fixture(params=["at once", "in two steps"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How two folders change places: as on Linux, or as where the system cannot."""
    if request.param == "in two steps":
        monkeypatch.setattr(exchange, "_find_renameat2", lambda: None)
    elif exchange._find_renameat2() is None:
        pytest.skip("this system cannot exchange two names")
    return request.param


def ours_and_theirs(target: Path) -> dict[str, str]:
    """Put a folder of ours there, and into it files of the user; the latter."""
    with atomic_folder(target, ours=has_plan, names=NAMES) as temporary:
        (temporary / "plan.json").write_text("old")
    (target / "notes.txt").write_text("precious")
    (target / "runs" / "deep").mkdir(parents=True)
    (target / "runs" / "deep" / "log").write_text("precious too")
    (target / "runs" / "plan.json").write_text("theirs")
    (target / "link").symlink_to("notes.txt")
    (target / "dangling").symlink_to("nowhere")
    return {"notes.txt": "precious", "link": "precious", "runs/deep/log": "precious too", "runs/plan.json": "theirs"}


def test_the_users_files_stay(tmp_path: Path, way: str) -> None:
    target = tmp_path / "small"
    theirs = ours_and_theirs(target)
    (target / "notes.txt").chmod(0o640)
    target.chmod(0o750)
    number = (target / "notes.txt").stat().st_ino
    with atomic_folder(target, ours=has_plan, names=NAMES) as temporary:
        (temporary / "weights").write_text("new")
    assert {name: (target / name).read_text() for name in theirs} == theirs
    assert (target / "dangling").is_symlink()
    assert (target / "link").is_symlink()
    assert ((target / "notes.txt").stat().st_ino, (target / "notes.txt").stat().st_mode & 0o777) == (number, 0o640)
    assert target.stat().st_mode & 0o777 == 0o750
    assert not (target / "plan.json").exists(), "of ours only what was written now"
    assert os.listdir(tmp_path) == ["small"]


def test_where_files_cannot_have_two_names_they_are_copied(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = ours_and_theirs(tmp_path / "small")

    def link(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    with atomic_folder(tmp_path / "small", ours=has_plan, names=NAMES) as temporary:
        (temporary / "plan.json").write_text("new")
    assert {name: (tmp_path / "small" / name).read_text() for name in theirs} == theirs
    assert os.listdir(tmp_path) == ["small"]


def test_what_the_user_writes_at_the_last_moment_stays(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "small"
    ours_and_theirs(target)
    swap = atomic.exchange

    def late(new: Path, old: Path, aside: Path) -> None:
        (target / "late.txt").write_text("late")
        (target / "notes.txt").unlink()
        (target / "notes.txt").write_text("anew")
        swap(new, old, aside)

    monkeypatch.setattr(atomic, "exchange", late)
    with atomic_folder(target, ours=has_plan, names=NAMES) as temporary:
        (temporary / "plan.json").write_text("new")
    assert [(target / n).read_text() for n in ("late.txt", "notes.txt", "plan.json")] == ["late", "anew", "new"]


def test_the_old_folder_is_put_back_if_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "small"
    target.mkdir()
    (target / "plan.json").write_text("old")
    rename = os.rename

    def failing(old: Path, new: Path) -> None:
        if (old / "new").exists() and new == target:
            raise OSError("disk is gone")
        rename(old, new)

    monkeypatch.setattr(exchange, "_find_renameat2", lambda: None)
    monkeypatch.setattr(exchange.os, "rename", failing)
    refusal = pytest.raises(FolderError, match="small: cannot be written .disk is gone.; nothing there is half-written")
    with refusal, atomic_folder(target, ours=has_plan, names=NAMES) as temporary:
        (temporary / "new").write_text("new")
    assert tree(tmp_path) == {"small/plan.json": "old"}


def killed_at(call: str, number: int, work: Callable[[], None]) -> bool:
    """Do it in a process of its own that is killed when it calls a function of `os` that often; whether it was."""
    process = os.fork()
    if process == 0:
        real, count = getattr(os, call), [0]

        def counted(*args: object, **kwargs: object) -> object:
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, call, counted)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("call", ["mkdir", "open", "fsync", "rename", "link", "scandir", "rmdir"])
def test_a_kill_at_every_step_leaves_the_old_folder_or_the_new_one(tmp_path: Path, way: str, call: str) -> None:
    """Kills before every call of the system, and what the next reader and the next writer then find."""
    kills = 0
    for number in range(1, 40, 3 if call in ("open", "scandir") else 1):
        root = tmp_path / str(number)
        target = root / "small"
        theirs = ours_and_theirs(target)

        def write(target: Path = target, what: str = "new") -> None:
            with atomic_folder(target, ours=has_plan, names=NAMES) as temporary:
                (temporary / "plan.json").write_text(what)
                (temporary / "weights").write_text(what)

        if not killed_at(call, number, write):
            break
        kills += 1
        assert atomic.read_whole(target, lambda f: (f / "plan.json").read_text()) in ("old", "new")
        assert {name: (target / name).read_text() for name in theirs} == theirs
        write(what="newer")
        assert os.listdir(root) == ["small"], "nothing is left for ever"
        assert {name: (target / name).read_text() for name in theirs} == theirs
        assert (target / "weights").read_text() == "newer"
    assert 1 <= kills < 13


def test_the_workspace_of_a_living_writer_is_nobodys_left_over(tmp_path: Path) -> None:
    target = tmp_path / "small"
    with atomic_folder(target, ours=has_plan, names=NAMES) as slow:
        (slow / "plan.json").write_text("slow")
        with atomic_folder(target, ours=has_plan, names=NAMES) as fast:
            (fast / "plan.json").write_text("fast")
        assert tree(target) == {"plan.json": "fast"}
        assert (slow / "plan.json").read_text() == "slow"
    assert tree(tmp_path) == {"small/plan.json": "slow"}, "the last one stays"


def test_a_lock_that_somebody_keeps_ends_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_PATIENCE_S", 0.05)
    (tmp_path / "small").mkdir()
    refusal = pytest.raises(FolderError, match="another process has been writing here for more than")
    with locks.lock(tmp_path), refusal, atomic_folder(tmp_path / "small", ours=has_plan, names=NAMES) as temporary:
        (temporary / "plan.json").write_text("new")
    with atomic_folder(tmp_path / "small", ours=has_plan, names=NAMES) as temporary:
        (temporary / "plan.json").write_text("new")
    assert tree(tmp_path) == {"small/plan.json": "new"}


def test_without_locks_it_still_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "small", ours=has_plan, names=NAMES) as temporary:
            (temporary / "plan.json").write_text(text)
    assert tree(tmp_path) == {"small/plan.json": "new"}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_files_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    old = os.umask(umask)
    try:
        with atomic_file(tmp_path / "a") as a, atomic_folder(tmp_path / "b", ours=has_plan, names=NAMES) as b:
            for path in (a, b / "weights"):
                path.touch(mode=0o600)
    finally:
        os.umask(old)
    assert [(tmp_path / n).stat().st_mode & 0o777 for n in ("a", "b/weights")] == [mode, mode]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "No space left on device.*free some space"),
        (errno.EROFS, "Read-only file system.*check the place"),
        (errno.EACCES, "Permission denied.*check the place"),
    ],
)
@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace", "rename"])
def test_what_the_system_refuses_is_said_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, remedy: str
) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "plan.json").write_text("old")
    (tmp_path / "table.md").write_text("old")

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    if call != "rename":
        refusal = pytest.raises(FolderError, match=f"table.md: cannot be written .{remedy}")
        with refusal, atomic_file(tmp_path / "table.md") as file:
            file.write_text("new")
    if call != "replace":
        refusal = pytest.raises(FolderError, match=f"small: cannot be written .{remedy}")
        with refusal, atomic_folder(tmp_path / "small", ours=has_plan, names=NAMES) as folder:
            (folder / "plan.json").write_text("new")
    monkeypatch.undo()
    assert tree(tmp_path) == {"small/plan.json": "old", "table.md": "old"}


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "a\0b"])
def test_names_that_cannot_be(tmp_path: Path, name: str) -> None:
    for write in (lambda p: atomic_file(p), lambda p: atomic_folder(p, ours=has_plan, names=NAMES)):
        refusal = pytest.raises(FolderError, match="cannot be written .File name too long|is no name of a file")
        with refusal, write(tmp_path / name):
            pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == []
