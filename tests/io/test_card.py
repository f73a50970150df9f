"""The model card: what it says, and whose README.md it is."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from bare import compress
from torch import nn

from intrafusion import Compressed
from intrafusion.io.card import escape


@pytest.fixture(scope="module")
def small() -> Compressed:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    return compress(net, torch.randn(2, 4), 0.5, images=torch.randn(40, 4), restore="images")


def test_it_says_what_was_done_and_how_to_load_it(small: Compressed, tmp_path: Path) -> None:
    small.save(tmp_path / "net")
    card = (tmp_path / "net" / "README.md").read_text()
    for part in (
        "# Sequential, made smaller",
        "From `torch.nn.modules.container.Sequential`",
        "| parameters | 58 -> 30 (51.7%) |",
        'model = intrafusion.load("this/folder", Sequential)',
        "- restored: ",
        "output error",
        "| 0 | 8 -> 4 | mixed | 2 |",
        "keep: 0.5",
        f"torch {torch.__version__}",
        time.strftime("%Y-", time.gmtime()),
        f"weights of the original: SHA-256 {small.original.sha256}" if small.original else "never",
    ):
        assert part in card, part
    assert str(tmp_path) not in card


def test_a_readme_of_the_users_stays(small: Compressed, tmp_path: Path) -> None:
    folder = tmp_path / "net"
    small.save(folder)
    first = (folder / "README.md").read_text()
    small.save(folder)
    assert (folder / "README.md").read_text() == first, "our own is written anew"
    for text in (first.replace("made smaller", "my network"), first + "\nMine.\n", "# Mine\n", "", first[:-1]):
        (folder / "README.md").write_text(text)
        for _ in range(2):
            small.save(folder)
            assert (folder / "README.md").read_text() == text
    (folder / "README.md").unlink()
    small.save(folder)
    assert (folder / "README.md").read_text() == first


def test_a_link_and_a_folder_of_its_name_stay_too(small: Compressed, tmp_path: Path) -> None:
    folder = tmp_path / "net"
    small.save(folder)
    (tmp_path / "elsewhere.md").write_text("mine")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "elsewhere.md")
    small.save(folder)
    assert (folder / "README.md").is_symlink()
    assert (tmp_path / "elsewhere.md").read_text() == "mine"
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    (folder / "README.md" / "x").write_text("mine")
    small.save(folder)
    assert (folder / "README.md" / "x").read_text() == "mine"


def test_a_readme_that_is_written_while_we_save(
    small: Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import intrafusion.io.folder as folders

    folder, save_file = tmp_path / "net", folders.save_file
    small.save(folder)

    def save_slowly(*args: object) -> None:
        save_file(*args)
        (folder / "README.md").write_text("just now")

    monkeypatch.setattr(folders, "save_file", save_slowly)
    small.save(folder)
    assert (folder / "README.md").read_text() == "just now"


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    assert escape("a|b*c_d`e[f](g)<h>") == r"a\|b\*c\_d\`e\[f\](g)\<h>"
    assert escape("# not\n- a heading") == r"\# not - a heading"
    assert len(escape("x" * 10_000)) == 200


def test_the_date_can_be_set(small: Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    small.save(tmp_path / "net")
    assert "; 1970-01-02" in (tmp_path / "net" / "README.md").read_text()
