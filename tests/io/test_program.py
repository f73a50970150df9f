"""Programs beside the weights: networks that run without their class, where the caller trusts the folder."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from bare import compress
from torch import Tensor, nn

from intrafusion import load
from intrafusion.errors import FolderError, ModelError
from intrafusion.io.checksums import digest_document, digest_file

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two outputs, a tied weight, a buffer that no state dict holds, and dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.b.weight = self.a.weight
        self.head, self.drop = nn.Linear(width, 2), nn.Dropout()
        self.register_buffer("scale", torch.tensor(1.5), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.norm(self.stem(x)).relu().mean((2, 3)) * self.scale
        return {"logits": self.head(self.drop(self.b(self.a(x).relu()).relu())), "features": [x.square().mean(1)]}


class OneSize(nn.Module):
    """Written for a batch of two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()).view(2, 2)


class Branch(nn.Module):
    """Goes where the data say."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.b(x) if bool(x.sum() > 0) else self.b(-x)


def test_a_program_computes_the_same_on_batches_of_every_size(tmp_path: Path) -> None:
    small = compress(Net(8).train(), X, 0.5)
    small.save(tmp_path / "net", program=True)
    found = load(tmp_path / "net", trust_program=True)
    small.model.eval()
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 6, 6)
        own, expected = found(x), small.model(x)
        torch.testing.assert_close(own["logits"], expected["logits"])
        torch.testing.assert_close(own["features"], expected["features"])
    assert found.eval() is found
    with pytest.raises(ModelError, match="load the network onto its class to train"):
        found.train()
    assert torch.equal(dict(found.named_parameters())["network.head.bias"], small.model.head.bias)


def test_without_the_callers_word_it_is_not_read(tmp_path: Path) -> None:
    compress(Net(8), X, 0.5).save(tmp_path / "net", program=True)

    class Bomb:
        def __reduce__(self) -> Any:
            return (tmp_path / "exploded").touch, ()

    (tmp_path / "net" / "program.pt2").write_bytes(pickle.dumps(Bomb()))
    load(tmp_path / "net", lambda: Net(8))
    with pytest.raises(ModelError, match=r"Give the class .*\.Net: .* Or trust_program=True, where you trust"):
        load(tmp_path / "net")
    with pytest.raises(FolderError, match="program.pt2: is not what was saved"):
        load(tmp_path / "net", trust_program=True)
    assert not (tmp_path / "exploded").exists()


def sign(folder: Path) -> None:
    path = folder / "plan.json"
    data = json.loads(path.read_text())
    data["sha256"] = {name: digest_file(folder / name) for name in ("model.safetensors", "program.pt2")}
    data["sha256"]["plan.json"] = digest_document(data)
    path.write_text(json.dumps(data))


def test_a_program_of_other_weights_and_a_damaged_one(tmp_path: Path) -> None:
    for name in ("net", "other"):
        compress(Net(8), X, 0.5).save(tmp_path / name, program=True)
    program = tmp_path / "net" / "program.pt2"
    program.write_bytes((tmp_path / "other" / "program.pt2").read_bytes())
    sign(tmp_path / "net")
    with pytest.raises(FolderError, match="program.pt2: its '.*' is not that of the weights beside it"):
        load(tmp_path / "net", trust_program=True)
    program.write_bytes(b"PK" + program.read_bytes()[100:])
    sign(tmp_path / "net")
    with pytest.raises(FolderError, match="program.pt2: no program, or a damaged one"):
        load(tmp_path / "net", trust_program=True)


def test_the_example_inputs_are_nobodys_business(tmp_path: Path) -> None:
    compress(Net(8), X, 0.5).save(tmp_path / "net", program=True)
    with zipfile.ZipFile(tmp_path / "net" / "program.pt2") as archive:
        assert all(X[0, 0, 0].numpy().tobytes() not in archive.read(name) for name in archive.namelist())


def test_a_network_of_one_batch_size(tmp_path: Path) -> None:
    small = compress(OneSize(), torch.randn(2, 4), 0.5)
    small.save(tmp_path / "net", program=True)
    x = torch.randn(2, 4)
    torch.testing.assert_close(load(tmp_path / "net", trust_program=True)(x), small.model(x))
    assert json.loads((tmp_path / "net" / "plan.json").read_text())["program"] == {"any_batch": False}
    assert "inputs of the shape of the example only" in (tmp_path / "net" / "README.md").read_text()


def test_keyword_arguments(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
            return self.b(self.a(x).relu()) * mask

    small = compress(Masked(), {"x": torch.randn(2, 4), "mask": torch.ones(2, 1)}, 0.5)
    small.save(tmp_path / "net", program=True)
    given = {"x": torch.randn(7, 4), "mask": torch.rand(7, 1)}
    torch.testing.assert_close(load(tmp_path / "net", trust_program=True)(**given), small.model(**given))


def test_where_it_does_not_export_nothing_is_written(tmp_path: Path) -> None:
    small = compress(Branch(), torch.randn(2, 4), 0.5)
    with pytest.raises(ModelError, match="torch.export does not take Branch .*; save without a program"):
        small.save(tmp_path / "net", program=True)
    assert list(tmp_path.iterdir()) == []
    small.save(tmp_path / "net")


def test_a_later_save_without_a_program_leaves_no_old_one(tmp_path: Path) -> None:
    small = compress(Net(8), X, 0.5)
    small.save(tmp_path / "net", program=True)
    small.save(tmp_path / "net")
    assert not (tmp_path / "net" / "program.pt2").exists()
    with pytest.raises(ModelError, match=r"Give the class [^;]*instance.$"):
        load(tmp_path / "net", trust_program=True)


def test_another_process_needs_no_class(tmp_path: Path) -> None:
    small = compress(Net(8).eval(), X, 0.5)
    small.save(tmp_path / "net", program=True)
    line = small.loading_line(tmp_path / "net")
    assert line == f"import intrafusion; model = intrafusion.load({str(tmp_path / 'net')!r}, trust_program=True)"
    code = f"{line}; import torch; print(model(torch.ones(7, 3, 6, 6))['logits'].tolist())"
    shown = programs.run(["-c", code], Path("/")).stdout
    torch.testing.assert_close(torch.tensor(json.loads(shown)), small.model(torch.ones(7, 3, 6, 6))["logits"])
