"""Folders in the format of Hugging Face: what is copied, what is corrected, and that nothing half-made appears."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import intrafusion
from intrafusion import Compressed
from intrafusion.errors import FolderError, ModelError
from intrafusion.io import folder as folders
from intrafusion.io.pretrained import _mend_widths, find_network_part
from intrafusion.network.sources import import_transformers

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")

TIMES = int(os.environ.get("INTRAFUSION_FUZZ", "1"))
IDS = torch.arange(3, 13)[None] % 40
MODULES = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]


def make_bert() -> nn.Module:
    transformers = import_transformers()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.BertModel(transformers.BertConfig(vocab_size=40, **sizes)).eval()


def write_sentence_folder(folder: Path, part: str = "") -> nn.Module:
    """As sentence-transformers writes it: modules.json, pooling, a module without files, a tokenizer, older weights."""
    model = make_bert()
    model.save_pretrained(folder / part)
    (folder / part / "vocab.txt").write_text("a\nb\n")
    (folder / part / "pytorch_model.bin").write_bytes(b"the old weights")
    (folder / part / "modeling_mine.py").write_text("raise SystemExit")
    (folder / "LICENSE").write_text("MIT")
    (folder / "README.md").write_text("the old network")
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    entries = [(kind, part if kind == "Transformer" else path) for kind, path in MODULES]
    told = [
        {"idx": i, "type": f"sentence_transformers.models.{kind}", "path": p} for i, (kind, p) in enumerate(entries)
    ]
    (folder / "modules.json").write_text(json.dumps(told))
    return model


def compress(model: nn.Module, keep: Any = 0.5) -> Compressed:
    return intrafusion.compress(model, {"input_ids": IDS}, keep, restore=None, uniform=True)


def list_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("part", ["", "0_Transformer"])
def test_a_folder_of_sentence_transformers(tmp_path: Path, part: str) -> None:
    model = write_sentence_folder(tmp_path / "old", part)
    before = list_files(tmp_path / "old")
    small = compress(model)
    small.save(tmp_path / "new", pretrained=tmp_path / "old")
    assert list_files(tmp_path / "old") == before
    found = type(model).from_pretrained(tmp_path / "new" / part).eval()
    assert found.config.intermediate_size == 12
    assert torch.equal(found(IDS)[0], small.model(IDS)[0])
    assert torch.equal(intrafusion.load(tmp_path / "new")(IDS)[0], small.model(IDS)[0])
    names = set(list_files(tmp_path / "new"))
    own = {f"{part}/{name}".lstrip("/") for name in ("config.json", "model.safetensors", "vocab.txt")}
    assert own | {"modules.json", "1_Pooling/config.json", "LICENSE", "plan.json", "recipe.yaml", "README.md"} <= names
    assert not {name for name in names if name.endswith((".bin", ".py"))}
    for name in ("modules.json", "1_Pooling/config.json", "LICENSE"):
        assert (tmp_path / "new" / name).read_bytes() == before[name]
    card = (tmp_path / "new" / "README.md").read_text()
    assert "transformers.BertModel.from_pretrained" in card
    assert "the old network" not in card


def test_another_network_in_the_same_folder_takes_the_configuration_with_it(tmp_path: Path) -> None:
    model = write_sentence_folder(tmp_path / "old")
    compress(model).save(tmp_path / "new", pretrained=tmp_path / "old")
    (tmp_path / "new" / "notes.txt").write_text("mine")
    again = intrafusion.compress(model, {"input_ids": IDS}, 0.5, restore=None)
    again.save(tmp_path / "new")
    names = {p.name for p in (tmp_path / "new").iterdir()}
    assert names == {"model.safetensors", "plan.json", "recipe.yaml", "README.md", "notes.txt"}
    torch.testing.assert_close(intrafusion.load(tmp_path / "new")(IDS)[0], again.model(IDS)[0])


def test_damage_of_what_from_pretrained_does_not_read_is_seen(tmp_path: Path) -> None:
    model = write_sentence_folder(tmp_path / "old")
    compress(model).save(tmp_path / "new", pretrained=tmp_path / "old")
    rest = tmp_path / "new" / "rest.safetensors"
    rest.write_bytes(rest.read_bytes()[:-1] + b"\x01")
    with pytest.raises(FolderError, match=r"rest\.safetensors: is not what was saved"):
        intrafusion.load(tmp_path / "new")


@pytest.mark.parametrize("name", ["old", "old/inside"])
def test_the_original_is_never_written_to(tmp_path: Path, name: str) -> None:
    """Also where it is a folder of ours, which saving would replace."""
    write_sentence_folder(tmp_path / "first")
    compress(make_bert()).save(tmp_path / "old", pretrained=tmp_path / "first")
    small = compress(type(make_bert()).from_pretrained(tmp_path / "old").eval())
    before = list_files(tmp_path / "old")
    with pytest.raises(FolderError, match="is or lies in the folder of the original"):
        small.save(tmp_path / name, pretrained=tmp_path / "old")
    assert list_files(tmp_path / "old") == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected modules with a type and a path"),
        ('[{"type": "x.Transformer"}]', "expected modules with a type and a path"),
        ('[{"type": "x.Transformer", "path": "../other"}]', "lies outside the folder; refused"),
        ('[{"type": "x.Transformer", "path": "/etc"}]', "lies outside the folder; refused"),
        ('[{"type": "x.Pooling", "path": ""}]', "expected one module of the type Transformer, got 0"),
    ],
)
def test_modules_that_mean_nothing(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(FolderError, match=message):
        find_network_part(tmp_path)


def test_modules_behind_the_network_are_told_its_width(tmp_path: Path) -> None:
    write_sentence_folder(tmp_path)
    _mend_widths(tmp_path, "", 16, 12)
    assert json.loads((tmp_path / "1_Pooling" / "config.json").read_text())["word_embedding_dimension"] == 12
    (tmp_path / "2_Normalize").mkdir()
    (tmp_path / "2_Normalize" / "config.json").write_text('{"in_features": 12}')
    with pytest.raises(ModelError, match="2_Normalize: reads outputs that were 12 wide and are 8 now"):
        _mend_widths(tmp_path, "", 12, 8)


def test_what_from_pretrained_opens_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_sentence_folder(tmp_path / "old")
    small = compress(model)
    save = type(model).save_pretrained

    def save_other(network: Any, place: Path, **options: Any) -> None:
        save(network, place, **options)
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))

    monkeypatch.setattr(type(model), "save_pretrained", save_other)
    with pytest.raises(ModelError, match="from_pretrained opens what save_pretrained wrote with outputs that differ"):
        small.save(tmp_path / "new", pretrained=tmp_path / "old")
    assert sorted(os.listdir(tmp_path)) == ["old"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_kills_leave_a_whole_folder_or_none(tmp_path: Path) -> None:
    model = write_sentence_folder(tmp_path / "old")
    pair, rng, seen = [compress(model, keep) for keep in (0.5, 0.25)], random.Random(0), []
    longest = 0.6
    before = list_files(tmp_path / "old")
    while len(seen) < 6 * TIMES or not {12, 6} & {*seen}:
        process = os.fork()
        if process == 0:
            try:
                for turn in range(1000):
                    pair[turn % 2].save(tmp_path / "new", pretrained=tmp_path / "old")
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0, longest))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        if not (tmp_path / "new").exists():
            seen.append(None)
            longest *= 1.5  # this machine is busy
            continue
        found = type(model).from_pretrained(tmp_path / "new").eval()
        width = found.config.intermediate_size
        small = pair[[12, 6].index(width)]
        assert torch.equal(found(IDS)[0], small.model(IDS)[0])
        assert torch.equal(intrafusion.load(tmp_path / "new")(IDS)[0], small.model(IDS)[0])
        assert (tmp_path / "new" / "1_Pooling" / "config.json").is_file()
        seen.append(width)
    assert list_files(tmp_path / "old") == before
    pair[0].save(tmp_path / "new", pretrained=tmp_path / "old")
    assert sorted(os.listdir(tmp_path)) == ["new", "old"], "the next save cleans up"


def test_weights_that_the_two_formats_name_otherwise_are_written_twice(tmp_path: Path) -> None:
    """As where transformers converts names between a file and a network."""
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    assert folders._write_weights(tmp_path, tensors) == ["model.safetensors"]
    assert folders._write_weights(tmp_path, {**tensors, "c": torch.ones(1)}) == [
        "model.safetensors",
        "rest.safetensors",
    ]
    assert folders._write_weights(tmp_path, {"other": torch.ones(2)}) == ["rest.safetensors"]
    assert set(folders.read_tensors(tmp_path / "rest.safetensors")) == {"other"}


def test_what_half_rounds_beside_the_weights_is_no_other_network(tmp_path: Path) -> None:
    """Angles, which `half()` rounds and `from_pretrained` does not."""
    transformers = import_transformers()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **sizes)).eval().half()
    model.save_pretrained(tmp_path / "old")
    example = {"input_ids": IDS, "use_cache": False}
    small = intrafusion.compress(model, example, {"*mlp*": 0.5, "*": 1.0}, restore=None, uniform=True)
    small.save(tmp_path / "new", pretrained=tmp_path / "old")
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "new", dtype="auto").eval()
    assert found.dtype == torch.float16
    assert found.config.intermediate_size == 12
    given, expected = (m.double()(IDS).logits.detach() for m in (found, small.model))
    assert 0 < float((given - expected).abs().max()) < 1e-3
