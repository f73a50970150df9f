"""The code of the pages of the stages, and of kinds of work, runs on small networks; their pictures are drawn."""

from __future__ import annotations

import contextlib
import io
import re
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import intrafusion
from intrafusion.cli.main import app
from intrafusion.lab import zoo
from intrafusion.lab.report.plot import COLOURS
from intrafusion.lab.zoo import Images
from intrafusion.network.sources import import_transformers

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PICTURES = sorted((DOCS / "pictures").glob("*.svg"))


def blocks(page: str, language: str = "python") -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return [code for kind, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if kind == language]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.body(x)).mean((2, 3)))


def make(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net().eval()


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What pages take for granted: a network, a call of it, inputs, and what was made of them."""
    monkeypatch.chdir(tmp_path)
    model, images = make(), torch.randn(64, 3, 8, 8)
    given: dict[str, Any] = {"torch": torch, "intrafusion": intrafusion, "MyNet": Net, "model": model, "images": images}
    given |= {"example": torch.randn(1, 3, 8, 8), "loader": list(images.split(16)), "example_inputs": images[:1]}
    given["accuracy"] = lambda network: 1 - float((network(images) - model(images)).detach().square().mean())
    return given


@pytest.fixture
def small(names: dict[str, Any]) -> dict[str, Any]:
    """The same, with a smaller network."""
    names["small"] = intrafusion.compress(names["model"], names["example"], 0.5, restore=None, progress=False)
    return names


def run(page: str, given: dict[str, Any], change: Callable[[str], str] = str) -> str:
    """What the blocks of a page print, one after the other."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for index, code in enumerate(blocks(page)):
            exec(compile(change(code), f"{page}, block {index}", "exec", dont_inherit=True), given)
    return printed.getvalue()


@pytest.mark.parametrize("page", ["importance.md", "reduce.md", "proof.md"])
def test_a_stage(page: str, names: dict[str, Any]) -> None:
    printed = run(page, names)
    assert names["small"].after.params < names["small"].before.params
    if page == "proof.md":
        assert printed == "{'stem.0': 'function'}\n"


def test_budget(names: dict[str, Any], tmp_path: Path) -> None:
    run("budget.md", names, lambda code: code.replace("(0.9, 0.8, 0.7, 0.6, 0.5)", "(0.9, 0.7, 0.5)"))
    assert (tmp_path / "frontier.png").stat().st_size > 1000
    assert (tmp_path / "mynet-small" / "plan.json").exists()
    assert names["small"].trials


def test_restoring(names: dict[str, Any]) -> None:
    short = {"120": "1", '"distill")': '{"name": "distill", "steps": 5})', '["synthetic", how]': "['noise']"}

    def shorten(code: str) -> str:
        for long, brief in short.items():
            code = code.replace(long, brief)
        return code

    run("restore.md", names, shorten)
    assert names["how"] == {"name": "distill", "seconds": 1, "folder": "checkpoints"}
    intrafusion.compress(
        names["model"], names["example"], 0.5, inputs=names["images"], restore=["images", names["how"]]
    )


def test_saving(names: dict[str, Any]) -> None:
    code = blocks("saving.md")[0]
    alone = 'model = intrafusion.load("mynet-small")  # what names itself: zoo, torchvision, timm, transformers\n'
    assert alone in code
    exec(code.replace(alone, ""), names)
    assert isinstance(names["model"], Net)
    example = zoo.example_input("digits_resnet")
    intrafusion.compress(zoo.build("digits_resnet"), example, 0.5, restore=None).save("mynet-small")
    exec(alone, names)
    assert type(names["model"]).__name__ == "ResNet"


def test_export(small: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs intrafusion[onnx]")
    run("export.md", small)
    assert {p.name for p in tmp_path.iterdir()} >= {"mynet.onnx", "mynet.pt2", "original.onnx"}


def test_fusion(names: dict[str, Any]) -> None:
    names |= {"a": make(1), "b": make(2), "c": make(3)}
    run("fusion.md", names)
    assert isinstance(names["fused"].model, Net)


def test_recovery(small: dict[str, Any], tmp_path: Path) -> None:
    data = Images(small["images"], torch.arange(64) % 4)
    small |= {"train_images": data, "validation_images": data, "original": small["model"], "compressed": small["small"]}
    run("recovery.md", small, lambda code: code.replace("epochs=5", "epochs=1"))
    assert (tmp_path / "thin").exists()
    assert small["thin"].model is not small["small"].model


def test_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transcript: what is behind each prompt is what stands below it, with `...` for anything."""
    monkeypatch.setenv("COLUMNS", "100")  # as the page is printed, whatever the runner of the tests says
    transcript, logs = blocks("looking.md")
    given = {"intrafusion": intrafusion, "model": zoo.build("cifar10_resnet20"), "example": torch.randn(1, 3, 32, 32)}
    for line, expected in re.findall(r"^>>> (.*)\n((?:(?!>>> ).*\n)*)", transcript, re.M):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(line, "looking.md", "single", dont_inherit=True), given)
        pattern = re.escape(expected.strip()).replace(r"\.\.\.", ".*")
        assert re.fullmatch(pattern, printed.getvalue().strip(), re.S), (line, printed.getvalue())
    assert "logging.INFO" in logs
    compile(logs, "looking.md", "exec")


def test_folders_of_transformers(names: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs intrafusion[transformers]")
    transformers = import_transformers()
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("accelerate", reason="needs intrafusion[train]")
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    words = {f"w{i}": i for i in range(59)} | {"<unk>": 59, "<pad>": 60}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>")
    for folder in ("llama", "original/folder"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    names |= {"tokenizer": tokenizer, "texts": [" ".join(f"w{(i * j) % 59}" for j in range(12)) for i in range(40)]}
    run("large.md", names)
    opened = transformers.AutoModelForCausalLM.from_pretrained("llama-small")
    assert opened.config.intermediate_size == 12
    names |= {"model": model, "example": {"input_ids": torch.arange(10)[None], "use_cache": False}}
    exec(blocks("saving.md")[1], names)
    assert (tmp_path / "small" / "tokenizer.json").exists()
    for page in ("large.md", "saving.md"):
        (line,) = (code for code in blocks(page, "") if code.startswith("intrafusion compress"))
        done = CliRunner().invoke(
            app, line.replace("FOLDER", "llama").replace("llama-small", f"{page}-small").split()[1:]
        )
        assert done.exit_code == 0, done.output
        assert transformers.AutoModelForCausalLM.from_pretrained(f"{page}-small").config.intermediate_size < 24


def test_every_extra_is_documented() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (DOCS / "start.md").read_text(encoding="utf-8").partition("## Extras")[2]
    told = re.findall(r"^\| `([\w-]+)` \|", page, re.M)
    others = set(re.findall(r"`([\w-]+)`", page.partition("For those who work")[2]))
    assert {*told, *others} == {*extras}
    assert extras["all"] == [f"intrafusion[{','.join(name for name in extras if name in told and name != 'all')}]"]


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_a_picture_is_light_shown_and_readable_on_dark_pages(path: Path) -> None:
    assert path.stat().st_size < 80_000
    text = path.read_text(encoding="utf-8")
    assert ET.fromstring(text).tag.endswith("svg")
    pages = [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "benchmarks" / "README.md"]
    assert any(f"pictures/{path.name})" in page.read_text(encoding="utf-8") for page in pages)
    if path.stem == "tracing":  # lies on white
        assert '<rect width="940" height="470" fill="#fff"/>' in text
        return
    assert "@media(prefers-color-scheme:dark)" in text
    assert not any(f": {colour}" in text for colour in COLOURS), "a colour that stays as it is on dark pages"


@pytest.mark.slow
def test_the_pictures_of_the_stages_are_drawn(tmp_path: Path, digits_network: nn.Module) -> None:
    script = DOCS / "pictures" / "draw_stages.py"
    scope: dict[str, Any] = {"__name__": "draw_stages", "__file__": str(script)}
    exec(compile(script.read_text(encoding="utf-8"), script.name, "exec", dont_inherit=True), scope)
    drawn = scope["Run"]()
    drawn.__dict__["model"] = digits_network
    for name in ("proof", "reduce", "solving"):
        scope["STAGES"][name](drawn, tmp_path / f"{name}.svg")
        labels = set(re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / f"{name}.svg").read_text()))
        assert labels == set(re.findall(r"<text[^>]*>([^<]*)</text>", (DOCS / "pictures" / f"{name}.svg").read_text()))
