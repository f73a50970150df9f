"""Safetensors in several files: what is read and written, and folders that are incomplete or lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from intrafusion.errors import FolderError
from intrafusion.io.shards import Shards, ShardWriter

INDEX = "model.safetensors.index.json"
A, B = torch.arange(6.0).reshape(2, 3), torch.arange(4).to(torch.bfloat16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    writer = ShardWriter(tmp_path, 2)
    writer.write({"b.weight": B})
    writer.write({"a.weight": A})
    writer.finish()
    return tmp_path


def test_what_is_written_is_read_again(folder: Path) -> None:
    files = {path.name for path in folder.iterdir()}
    assert files == {INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == 6 * 4 + 4 * 2
    shards = Shards.of(folder)
    assert {n: (s.file.name, s.shape, s.dtype) for n, s in shards.tensors.items()} == {
        "a.weight": ("model-00002-of-00002.safetensors", (2, 3), "F32"),
        "b.weight": ("model-00001-of-00002.safetensors", (4,), "BF16"),
    }
    assert torch.equal(shards.read("a.weight"), A)
    assert torch.equal(shards.read("b.weight"), B)


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model.safetensors")
    assert torch.equal(Shards.of(tmp_path).read("a"), A)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FolderError, match="model-00002-of-00002.safetensors is not there, with 1 of its tensors"):
        Shards.of(folder)


def test_a_damaged_shard_is_named(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(FolderError, match="model-00001-of-00002.safetensors: not a safetensors file"):
        Shards.of(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "expected the file of every tensor as weight_map"),
        ('{"weight_map": []}', "expected the file of every tensor as weight_map"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "lies outside the folder"),
        ('{"weight_map": {"c": "model-00001-of-00002.safetensors"}}', "names c, not found there"),
    ],
)
def test_an_index_that_lies_is_refused(folder: Path, index: str, message: str) -> None:
    (folder / INDEX).write_text(index)
    with pytest.raises(FolderError, match=message):
        Shards.of(folder)


def test_a_folder_without_safetensors_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="expected model.safetensors or model.safetensors.index.json, got neither"):
        Shards.of(tmp_path)
