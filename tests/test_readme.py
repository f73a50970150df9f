"""What the README, and the table of wishes in docs/choose.md, say to type does what it says."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from typer.main import get_command
from typer.testing import CliRunner

import intrafusion
from intrafusion import Recipe
from intrafusion.cli.main import app
from intrafusion.measure.closeness import OUTPUT_ERROR
from intrafusion.table import MEANINGS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
WISHES = (ROOT / "docs" / "choose.md").read_text().partition("## Every wish")[2].strip()
NET = """
from torch import nn
class MyNet(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
"""
SMALL = {
    "(1, 3, 224, 224)": "(1, 3, 8, 8)",
    "1,3,224,224": "1,3,8,8",
    "images = ...": "images = torch.randn(64, 3, 8, 8)",
}


def code_blocks(language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [code for kind, code in blocks if kind == language]


def on_small_images(code: str) -> str:
    for shown, small in SMALL.items():
        code = code.replace(shown, small)
    return code


def rows() -> dict[str, list[str]]:
    """Snippets of the table of wishes, by wish."""
    found = re.findall(r"^\| ([^|`]+?) \| (.*) \|$", WISHES.partition("\n")[2], re.MULTILINE)
    return {wish: re.findall(r"`([^`]+)`", say) for wish, say in found}


def names() -> dict[str, Any]:
    made: dict[str, Any] = {"torch": torch, "intrafusion": intrafusion}
    exec(NET, made)
    return made


def test_the_python_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = code_blocks("python")
    given = names()
    exec(on_small_images(code), given)
    assert {row.split()[0] for row in capsys.readouterr().out.splitlines()[1:4]} == {"parameters", "MACs", "file"}
    assert given["small"].after.macs < 0.7 * given["small"].before.macs
    assert isinstance(given["model"], nn.Module)


def test_the_shell_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mynet.py").write_text(NET)
    safetensors.torch.save_file(names()["MyNet"]().state_dict(), "mynet.safetensors")
    lines = next(block for block in code_blocks("") if block.startswith("intrafusion ")).splitlines()
    assert [line.split()[1] for line in lines] == ["inspect", "compress"]
    for line in lines:
        done = CliRunner().invoke(app, on_small_images(line).split()[1:])
        assert done.exit_code == 0, done.output
        assert "mixed: new channels may combine old ones" in done.output
    assert (tmp_path / "mynet-small" / "plan.json").is_file()


def test_words_mean_what_the_tables_say_that_they_mean() -> None:
    plain = " ".join((ROOT / "docs" / "looking.md").read_text().replace("*", "").split()).lower()
    for word, meaning in MEANINGS.items():
        assert f"{word}: {meaning}" in plain, word
    assert f"output error is {OUTPUT_ERROR}" in " ".join(README.replace("*", "").split())


OPTIONS = [(wish, snippet) for wish, snippets in rows().items() for snippet in snippets if re.match(r"\w+=.", snippet)]


@pytest.mark.parametrize(("wish", "snippet"), OPTIONS)
def test_options_in_the_table_mean_something(wish: str, snippet: str) -> None:
    given = eval(f"dict({snippet})", names())
    assert set(given) <= {*inspect.signature(intrafusion.compress).parameters}, wish
    Recipe.of(**{k: v for k, v in given.items() if k in Recipe.options() and v is not ...})


def test_every_row_of_the_table_was_read() -> None:
    assert len(rows()) == WISHES.count("\n|") - 1
    assert len(OPTIONS) >= 10


def test_functions_in_the_table_exist() -> None:
    calls = [s for snippets in rows().values() for s in snippets for s in re.findall(r"intrafusion(?:\.\w+)+", s)]
    assert len(calls) >= 8
    for call in calls:
        found: Any = intrafusion
        for name in call.split(".")[1:]:
            found = getattr(found, name)


def test_commands_in_the_table_exist() -> None:
    commands = {s.split()[1] for snippets in rows().values() for s in snippets if s.startswith("intrafusion ")}
    assert commands == {"compress", "experiment", "export", "report"}
    assert commands <= set(get_command(app).commands)  # type: ignore[attr-defined]


def test_types_in_the_row_of_exclude_may_be_in_a_network() -> None:
    given = eval(
        "dict({})".format(rows()["to leave layers alone"][0].replace('"stem.*", "head:inputs"', '"0"')), names()
    )
    small = intrafusion.compress(names()["MyNet"](), torch.randn(2, 3, 8, 8), 0.5, restore=None, **given)
    assert small.plan.sizes == {"3": 8}


def test_looking_before_leaping_mixes() -> None:
    """The row says that the plan is what would become of the groups: it is not one that only selects."""
    given = {**names(), "example": torch.randn(1, 3, 8, 8), "images": torch.randn(64, 3, 8, 8)}
    given["model"] = given["MyNet"]().eval()
    for snippet in rows()["to look before you leap"]:
        exec(snippet, given)
    assert {d.mixing for d in given["plan"].decisions if d.reduced} == {"mixed"}
    assert given["plan"].sizes == {"0": 8, "3": 8}
    blind = intrafusion.decide(given["model"], given["graph"], Recipe.of(keep=0.5), given["example"])
    assert any("decide() on calibration=intrafusion.restore.calibrate(" in w for w in blind.warnings)
    assert blind.decisions[0].mixing.startswith("selected")


def test_it_fits_two_screens_with_one_table_and_two_pictures() -> None:
    hidden = r"\]\([^)]*\)|<!--.*-->|\*\*"  # addresses, comments, what makes bold
    shown = [re.sub(hidden, "", line) for line in README.splitlines()]
    assert sum(1 + max(len(line) - 1, 0) // 110 for line in shown) <= 105
    assert len(re.findall(r"^\|---", README, re.MULTILINE)) == 1
    assert README.count("![") == 2
