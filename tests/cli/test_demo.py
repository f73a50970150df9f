"""intrafusion demo: its numbers are those of the library, its files stand, and it touches no others."""

from __future__ import annotations

import copy
import csv
import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from PIL import Image
from torch import nn

import intrafusion
from intrafusion.cli import demo
from intrafusion.lab import zoo
from intrafusion.lab.report.plot import accuracy_plot
from intrafusion.measure.accuracy import accuracy

KEEPS = (0.9, 0.5)


@pytest.fixture(scope="module")
def network(digits_network: nn.Module) -> nn.Module:
    return copy.deepcopy(digits_network)


@pytest.fixture(scope="module")
def made(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[demo.Row], Path]:
    folder = tmp_path_factory.mktemp("demo") / "made"
    return demo.run(network, folder, KEEPS), folder


def test_the_rows_are_what_the_library_gives(network: nn.Module, made: tuple[list[demo.Row], Path]) -> None:
    rows, _ = made
    test = zoo.load_data("digits_resnet", "test")
    assert [(row.method, row.keep) for row in rows] == [
        ("original", 1.0),
        ("pruned", 0.9),
        ("fused", 0.9),
        ("on noise", 0.9),
        ("on images", 0.9),
        ("pruned", 0.5),
        ("fused", 0.5),
        ("on noise", 0.5),
        ("on images", 0.5),
    ]
    assert rows[0].params == sum(p.numel() for p in network.parameters())
    assert rows[0].accuracy == accuracy(network, test.images, test.labels) > 0.95
    images = zoo.load_data("digits_resnet", "train", limit=256).images
    methods = (("select", None, None), ("intrafusion", None, None), ("pivot", "noise", None), ("pivot", "auto", images))
    for row, (reducer, restore, given) in zip(rows[1:], methods * 2, strict=True):
        example = zoo.example_input("digits_resnet")
        small = intrafusion.compress(network, example, row.keep, reducer=reducer, restore=restore, inputs=given)
        assert row.accuracy == accuracy(small.model, test.images, test.labels)
        assert (row.params, row.macs) == (small.after.params, small.after.macs)
    assert rows[2].accuracy > rows[1].accuracy + 0.1  # fused against pruned at keep 0.9
    assert rows[7].accuracy > rows[6].accuracy + 0.2  # on noise against fused at keep 0.5


def test_table_plot_and_network_are_written(made: tuple[list[demo.Row], Path]) -> None:
    rows, folder = made
    with (folder / "accuracy.csv").open(newline="") as file:
        read = [
            demo.Row(r["method"], *(float(r[k]) for k in ("keep", "params", "macs", "accuracy")))
            for r in csv.DictReader(file)
        ]
    assert read == rows
    loaded = intrafusion.load(folder / "restored-50", zoo.build("digits_resnet"))
    test = zoo.load_data("digits_resnet", "test")
    assert accuracy(loaded, test.images, test.labels) == rows[8].accuracy
    assert sorted(p.name for p in folder.iterdir()) == ["accuracy.csv", "accuracy.png", "report.html", "restored-50"]
    assert "layer1.0.conv1" in (folder / "report.html").read_text()


def test_running_again_replaces_its_own_files_only(network: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "accuracy.csv").write_text("old")
    intrafusion.compress(network, zoo.example_input("digits_resnet"), 0.9, restore=None).save(tmp_path / "restored-50")
    before = (tmp_path / "restored-50" / "model.safetensors").stat().st_size
    demo.run(network, tmp_path, (0.5,))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "restored-50" / "model.safetensors").stat().st_size < before
    assert (tmp_path / "accuracy.csv").read_text().startswith("method,keep,params,macs,accuracy\noriginal,1.0,77754,")


def test_the_command(
    program: Callable[[str], Result], network: nn.Module, monkeypatch: pytest.MonkeyPatch, user_folder: Path
) -> None:
    assert inspect.signature(demo.run).parameters["keeps"].default == (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    monkeypatch.setattr(demo, "run", functools.partial(demo.run, keeps=KEEPS))
    monkeypatch.setattr(zoo, "train_digits", lambda: network)
    result = program("demo -o out")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("test accuracy on 360 digits; the original has 9")
    assert [line.split()[0] for line in lines[4:6]] == ["90%", "50%"]
    with Path("out/accuracy.csv").open(newline="") as file:
        found = {(r["method"], r["keep"]): r for r in csv.DictReader(file)}
    row = [found[method, "0.9"] for method in ("pruned", "fused", "on noise", "on images")]
    assert lines[4].split() == ["90%", f"{int(row[0]['params']):,}", *(f"{float(r['accuracy']):.1%}" for r in row)]
    scope: dict[str, Any] = {}
    exec(lines[-1], scope)
    test = zoo.load_data("digits_resnet", "test")
    assert accuracy(scope["model"], test.images, test.labels) == float(found["on images", "0.5"]["accuracy"])


@pytest.mark.parametrize(
    ("folder", "message"),
    [("nets.py", "nets.py: expected a folder, but this is a file"), ("taken", "taken/restored-50: exists and was not")],
)
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    program: Callable[[str], Result], monkeypatch: pytest.MonkeyPatch, folder: str, message: str
) -> None:
    monkeypatch.setattr(zoo, "train_digits", lambda: pytest.fail("trained before the folder was checked"))
    Path("taken/restored-50").mkdir(parents=True)
    Path("taken/restored-50/thesis.txt").write_text("mine")
    result = program(f"demo -o {folder}")
    assert result.exit_code == 2
    assert message in result.stderr
    assert Path("taken/restored-50/thesis.txt").read_text() == "mine"


def test_the_plot_is_an_image_with_every_curve_in_its_colour(tmp_path: Path) -> None:
    def colours(curves: dict[str, list[tuple[float, float]]]) -> set[tuple[int, ...]]:
        accuracy_plot(tmp_path / "plot.png", curves, original=0.9, title="two curves")
        with Image.open(tmp_path / "plot.png") as image:
            assert image.size == (960, 630)
            return {colour[:3] for _, colour in image.convert("RGB").getcolors(maxcolors=1 << 24) or []}

    orange, blue = (0xC2, 0x57, 0x1A), (0x1F, 0x5F, 0x99)
    points = [(0.9, 0.8), (0.5, 0.4)]
    assert colours({"one": points}) & {orange, blue} == {orange}
    assert colours({"one": points, "two": [(x, y / 2) for x, y in points]}) >= {orange, blue}


def test_the_plot_draws_percent(tmp_path: Path) -> None:
    accuracy_plot(tmp_path / "plot.svg", {"fused": [(0.9, 0.8), (0.5, 0.4)]}, original=0.987, title="t")
    text = (tmp_path / "plot.svg").read_text()
    for label in ("original 98.7%", "channels kept (%)", "test accuracy (%)", "fused"):
        assert f">{label}</text>" in text


def test_a_drawing_has_the_colours_of_light_and_of_dark_pages(tmp_path: Path) -> None:
    for name in ("plot.svg", "again.svg"):
        accuracy_plot(tmp_path / name, {"fused": [(0.9, 0.8), (0.5, 0.4)]}, original=0.9)
    text = (tmp_path / "plot.svg").read_text()
    assert text == (tmp_path / "again.svg").read_text()
    light, dark = re.findall(r":root\{(.*?)\}", text)
    used = set(re.findall(r"var\((--\w+)\)", text))
    assert "--cc2571a" in used
    for name in used:
        found = [re.search(f"{name}:(#\\w+);", colours) for colours in (light, dark)]
        assert found[0]
        assert found[1]
        assert found[0][1] == f"#{name[3:]}" != found[1][1]


def test_torch_runs_on_one_thread_in_the_demo(
    program: Callable[[str], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(demo, "run", lambda *_: threads.append(torch.get_num_threads()) or [])
    monkeypatch.setattr(demo, "show", lambda *_, **__: None)
    monkeypatch.setattr(zoo, "train_digits", lambda: nn.Identity())
    torch.set_num_threads(2)
    assert program("demo").exit_code == 0
    assert threads == [1]
