"""The tour runs: every example and the notebook, as a reader would run them, in a folder of their own."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
from vision import import_torchvision

EXAMPLES = Path(__file__).parents[1] / "examples"
NUMBERED = sorted(EXAMPLES.glob("[0-9][0-9]_*.py"))
NEEDS = {"02_timm_macs_target": "timm", "04_sentence_encoder": "transformers", "05_language_model": "transformers"}
SAYS = {
    "01_your_own_cnn": r"accuracy on 597 test images: 9\d\.\d % -> [89]\d\.\d %",
    "02_timm_macs_target": r"MACs",
    "03_detector": r"squares found: \d+ % -> \d+ %",
    "04_sentence_encoder": r"encoder\.layer",
    "05_language_model": r"model\.layers",
    "06_without_data": r"restore='noise': \d+\.\d %",
    "07_fuse_two": r"fused \d+\.\d %",
    "08_split_training": r"fine-tune compressed: 1 network",
    "09_a_method_of_your_own": r"largest_weight restored",
    "10_exporting": r"exported and loaded back: \(128, 10\)",
}


@pytest.mark.slow
@pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.stem)
def test_example(path, tmp_path, monkeypatch, capsys):
    if path.stem in NEEDS:
        import_torchvision()
        pytest.importorskip(NEEDS[path.stem])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert re.search(SAYS[path.stem], capsys.readouterr().out)


def test_the_table_of_contents_names_every_example():
    shown = re.findall(r"^\| \[(\S+)\]\((\S+)\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert [name for name, link in shown if name == link] == [path.name for path in NUMBERED]
    assert set(SAYS) == {path.stem for path in NUMBERED}


@pytest.mark.slow
def test_notebook(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat: pip install 'intrafusion[dev]'")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient: pip install 'intrafusion[dev]'")
    text, sizes = (EXAMPLES / "tour.ipynb").read_text(), "sizes = [0.8, 0.65, 0.5, 0.35, 0.2]"
    assert text.count(sizes) == 1
    notebook = nbformat.reads(text.replace(sizes, "sizes = [0.8, 0.35]"), as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (tmp_path / "digits-small" / "plan.json").is_file()
    assert not re.search(r"Traceback|Warning", json.dumps(outputs))
