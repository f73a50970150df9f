"""Every option of every command with wrong values: one message and exit code 2, no traceback, nothing half-written.

A value that an option takes after all, such as 0 for a seed, has to work.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from intrafusion.cli import demo, split_train
from intrafusion.cli.main import COMMANDS, app
from intrafusion.lab import zoo
from intrafusion.lab.bench import Record, append_record

NUMBERS = ("", "x", "-1", "nan", "inf", "1e30", "-inf", "9" * 30, "0.5.5", "[red]")
WORDS = ("", "x", "-1", "nan", "1e30", "[red]", "mm.py:M:", "missing.file", ".", "/proc/x", "ünïcödé", "a=b=c")
NET = ["nets.py:Net", "--input", "2,4"]
BASES = {
    "inspect": NET,
    "compress": [*NET, "--restore", "none"],
    "frontier": [*NET, "--restore", "none", "--size", "0.5"],
    "export": [*NET, "-o", "net.pt2"],
    "fuse": [*NET, "--weights", "w.safetensors", "--weights", "w.safetensors"],
    "split-train": ["zoo:digits_resnet", "--train-images", "40", "--schedule", "whole"],
    "experiment": ["whole-model", "--model", *NET, "--data", "d.safetensors", "--keep", "0.5", "--method", "select"],
    "report": ["r.jsonl"],
    "demo": [],
}
ENDLESS = {"--networks", "--seeds"}  # that a large number makes long work of, by design
REMOTE = {"--ray"}  # another program answers


class Reached(Exception):
    """The work would begin now."""


@pytest.fixture
def folder(user_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder with data, weights and records; the long work of some commands is not begun."""
    net = nn.ModuleDict({"first": nn.Linear(4, 8), "second": nn.Linear(8, 6), "third": nn.Linear(6, 3)})
    save_file(net.state_dict(), "w.safetensors")
    images = {"test_images": torch.randn(6, 4), "test_labels": torch.arange(6) % 3}
    save_file({**images, "train_images": torch.randn(6, 4), "train_labels": torch.arange(6) % 3}, "d.safetensors")
    setting = {"network": "n", "group": "none", "keep": 1.0, "method": "original"}
    append_record(Path("r.jsonl"), Record("whole-model", setting, {"accuracy": 0.5, "params": 1, "macs": 1}))

    def reached(*_: Any, **__: Any) -> None:
        raise Reached

    monkeypatch.setattr(split_train, "split_train", reached)
    monkeypatch.setattr(zoo, "train_digits", lambda **_: zoo.build("digits_resnet"))
    monkeypatch.setattr(demo, "run", reached)
    return user_folder


def cases(command: str, options: Iterable[Any]) -> Iterator[tuple[str, list[str]]]:
    """(wrong value, command line that holds it)."""
    base = BASES[command]
    for option in options:
        name = option.names[0]
        if option.kind is bool or name in REMOTE:
            continue
        for value in NUMBERS if option.kind in (int, float) or name in ENDLESS else WORDS:
            if option.argument:
                yield value, [command, value, *base[1:]]
            else:
                kept = base[: base.index(name)] + base[base.index(name) + 2 :] if name in base else base
                yield value, [command, *kept, f"{name}={value}"]


def contents(folder: Path) -> dict[str, bytes | None]:
    files = [p for p in folder.rglob("*") if "__pycache__" not in p.parts]
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(files)}


def clean(folder: Path, before: dict[str, bytes | None]) -> None:
    for path in folder.iterdir():
        if path.name not in before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def complaint(value: str, result: Result) -> str | None:
    """What is wrong with how the program ended."""
    if isinstance(result.exception, Reached) or "Reached" in result.stderr or result.exit_code == 0:
        return None
    if result.exit_code != 2 or not isinstance(result.exception, (SystemExit, type(None))):
        return f"exit code {result.exit_code}"
    if result.stdout or not result.stderr.strip():
        return "a message that is not on standard error"
    if "Traceback" in result.stderr or "defect" in result.stderr:
        return "a traceback"
    text = "".join(result.stderr.split()).replace("│", "")
    if "error:" not in text and "Error" not in text:
        return "no word of an error"
    ours = value in ("[red]", "mm.py:M:") and "Invalidvalue" not in text  # which typer says, without the value
    return None if not ours or value in text else "a value that is not shown as it is"


@pytest.mark.parametrize("command", BASES)
def test_wrong_values(command: str, folder: Path, option_script: ModuleType) -> None:
    assert set(BASES) == set(COMMANDS)
    before, found, tried = contents(folder), [], 0
    for value, line in cases(command, option_script.options_of(COMMANDS[command])):
        result = CliRunner().invoke(app, line)
        wrong, tried = complaint(value, result), tried + 1
        if wrong is None and result.exit_code != 0 and contents(folder) != before:
            wrong = "something was written"
        if wrong is not None:
            found.append(f"{line}: {wrong}\n{result.stderr[-400:]}")
        clean(folder, before)
        Path("r.jsonl").write_bytes(before["r.jsonl"] or b"")
    assert found == [], f"{len(found)} of {tried}:\n" + "\n".join(found)
