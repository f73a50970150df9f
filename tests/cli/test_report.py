"""intrafusion report: pages out of records and of saved folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from lab.report.samples import some_of_every_experiment

from intrafusion.lab.bench import append_record
from intrafusion.lab.report import html
from intrafusion.restore import save_images

Program = Callable[[str], Result]


@pytest.fixture(autouse=True)
def no_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "_packed_plotly", lambda: "")


@pytest.fixture
def files(user_folder: Path) -> None:
    """Two files of records."""
    for i, record in enumerate(some_of_every_experiment()):
        append_record(user_folder / ("a.jsonl" if i < 10 else "b.jsonl"), record)


def test_records_of_several_files_make_one_page(program: Program, files) -> None:
    result = program("report a.jsonl b.jsonl -o out/page.html")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("wrote out/page.html, 0.")
    text = Path("out/page.html").read_text()
    for section in ("curves", "accuracy", "gains", "marginals", "training", "drift", "landscape", "reproduce"):
        assert f'<section id="{section}">' in text
    assert "<dd>a.jsonl, b.jsonl</dd>" in text
    assert '<section id="images">' not in text


def test_images_are_shown(program: Program, files) -> None:
    save_images(torch.rand(4, 3, 8, 8), "images.safetensors")
    assert program("report a.jsonl --images images.safetensors").exit_code == 0
    assert 'src="data:image/png;base64,' in Path("report.html").read_text()


def test_a_saved_folder_makes_a_page_of_its_plan(program: Program) -> None:
    assert program("compress nets.py:Net --input 2,4 --keep 0.5 -o small --reducer intrafusion").exit_code == 0
    result = program("report small")
    assert result.exit_code == 0, result.stderr
    text = Path("report.html").read_text()
    assert '<td class="number" data-value="8">8</td><td class="number" data-value="4">4</td>' in text
    assert "<h1>small</h1>" in text
    assert Path("small/recipe.yaml").read_text().splitlines()[0] in text
    assert "intrafusion.load(&#x27;small&#x27;, OriginalNetwork)" in text
    assert "restored: Noise on 512 noise images" in text
    assert "Mixed: new channels may combine old ones" in text
    assert "The output error is the mean squared difference" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("report none.jsonl", "none.jsonl: expected a file of records, but there is none"),
        ("report empty", "was not saved by intrafusion"),
        ("report a.jsonl empty", "this is a folder; give it alone"),
        ("report nets.py", "nets.py: holds no record"),
        ("report a.jsonl -o empty", "expected the name of a file, but this is a folder"),
        ("report a.jsonl --images nets.py", "--images nets.py: expected .npy, or .npz, .safetensors or .pt"),
    ],
)
def test_what_makes_no_page_is_told(program: Program, files, line: str, message: str) -> None:
    Path("empty").mkdir()
    result = program(line)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in " ".join(result.stderr.split())
    assert not Path("report.html").exists()
