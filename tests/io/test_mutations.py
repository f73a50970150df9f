"""Damaged folders: whatever was done to one, it loads exactly what was saved, or is refused and nothing was touched.

`INTRAFUSION_FUZZ=20` tries twenty times as many; with `-s` the counts are shown.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import os
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from bare import compress
from torch import Tensor, nn

from intrafusion import load
from intrafusion.errors import IntrafusionError, IntrafusionWarning
from intrafusion.factorize import factorize
from intrafusion.io.checksums import digest_document, digest_file
from intrafusion.io.folder import load_plan, save_plan
from intrafusion.lab import zoo
from intrafusion.network.sources import import_transformers
from intrafusion.plan import Plan

TIMES = int(os.environ.get("INTRAFUSION_FUZZ", "1"))
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions, norms, a tied weight, buffers of three kinds, one of which gets infinities on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 1, groups=8)
        self.a, self.b, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.b.weight = self.a.weight
        self.head = nn.Linear(8, 2)
        self.register_buffer("mask", torch.tensor([0.0, 1.0]))
        self.register_buffer("steps", torch.tensor(3))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.stem(x)).relu()).relu().mean((2, 3))
        return self.head(self.last(self.b(self.a(x).relu()).relu()))


Folder = tuple[Path, Callable[[], nn.Module], nn.Module]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Folder]:
    """(folder, the original, what it holds): a reduced network, one split after it was reduced, one split before."""
    root, net = tmp_path_factory.mktemp("saved"), Net()
    small = compress(net, X, 0.5)
    after = factorize(small.model, X, {"stem": 2, "head": 1})
    before = compress(factorize(net, X, {"stem": 2, "head": 1}).model, X, 0.5)
    made = []
    for name, one in (("reduced", small), ("after", after), ("before", before)):
        original = small.model if name == "after" else net
        one.model.get_buffer("mask")[1] = -torch.inf  # on purpose, and there when it is saved
        one.save(root / name)
        made.append((root / name, lambda original=original: copy.deepcopy(original), one.model))
    return made


# ---- what can be done to a folder -----------------------------------------------------------------------------------


def odd(rng: random.Random) -> Any:
    """A value of another kind, or one that nobody expects."""
    deep: Any = 0
    for _ in range(rng.choice([3, 90, 300])):
        deep = [deep] if rng.random() < 0.5 else {"x": deep}
    plain = [None, True, False, 0, -1, 1, 2, 7, 10**9, 10**400, 1.5, float("nan"), float("inf"), "", "x", "a\0b"]
    return rng.choice([*plain, [], {}, [None], {"a": 1}, "../x", "x" * 5000, [[1]], {"": {}}, deep, "stem", [8, 8]])


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a value."""
    found: list[tuple[Any, Any]] = []
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        found += [(value, key), *places(value[key])]
    return found


def change_values(folder: Path, rng: random.Random) -> None:
    """One to three entries of plan.json replaced, removed, doubled or swapped."""
    data = json.loads((folder / "plan.json").read_text())
    for _ in range(rng.randint(1, 3)):
        top = [(data, key) for key in data]
        found = places(data)
        container, key = rng.choice(top if rng.random() < 0.4 else found)
        other, second = rng.choice(found)
        how = rng.choice(["odd", "odd", "gone", "swap", "nudge", "copy"])
        try:
            if how == "odd":
                container[key] = odd(rng)
            elif how == "gone":
                del container[key]
            elif how == "swap":
                container[key], other[second] = other[second], container[key]
            elif how == "copy":
                container[key] = copy.deepcopy(other[second])
            elif isinstance(container[key], int):
                container[key] += rng.choice([-1, 1, 1000])
        except (KeyError, IndexError, ValueError, RecursionError):
            continue  # a part of what was changed before
    write_json(folder, data)


def write_json(folder: Path, data: Any) -> None:
    try:
        text = json.dumps(data)
    except (ValueError, RecursionError):  # swapped into itself
        text = "[" * 50_000
    (folder / "plan.json").write_text(text)


def change_bytes(folder: Path, rng: random.Random) -> None:
    """Bits flipped, bytes cut off, removed, doubled, overwritten."""
    path = rng.choice(sorted(folder.iterdir()))
    content = bytearray(path.read_bytes())
    start = rng.randrange(min(len(content), rng.choice([16, 600, len(content)])))
    stop = min(len(content), start + rng.choice([1, 8, 300]))
    how = rng.choice(["flip", "flip", "cut", "gone", "again", "zero", "noise", "more", "empty"])
    if how == "flip":
        content[start] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[start:]
    elif how == "gone":
        del content[start:stop]
    elif how == "again":
        content[start:start] = content[start:stop]
    elif how == "zero":
        content[start:stop] = bytes(stop - start)
    elif how == "noise":
        content[start:stop] = rng.randbytes(stop - start)
    elif how == "more":
        content += rng.randbytes(9)
    else:
        content.clear()
    path.write_bytes(content)


def change_files(folder: Path, rng: random.Random) -> None:
    """A file removed, exchanged with another one, made a folder, a link in a circle, or unending depth."""
    path, other = rng.sample(sorted(folder.iterdir()), 2)
    how = rng.choice(["gone", "swap", "folder", "circle", "deep", "long"])
    if how == "swap":
        one, two = path.read_bytes(), other.read_bytes()
        path.write_bytes(two)
        other.write_bytes(one)
        return
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "circle":
        path.symlink_to(path.name)
    elif how == "deep":
        path.write_text('{"kind":' + "[" * 100_000)
    elif how == "long":
        path.write_text('{"kind": "intrafusion", "format": ' + "9" * 5000 + "}")


def change_recipe(folder: Path, rng: random.Random) -> None:
    """The recipe inside plan.json: bombs, circles, wrong kinds."""
    data = json.loads((folder / "plan.json").read_text())
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(9)
    )
    merged = "a: &a {x: 1}\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{', '.join([f'*{chr(97 + i)}'] * 20)}]}}\n" for i in range(9)
    )
    lines = data["recipe"].splitlines()
    line = rng.randrange(len(lines))
    key = lines[line].partition(":")[0]
    kinds = ["[1]", "{a: [1]}", "2001-99-99", "!!bool foo", "!!int ''", "9" * 5000, "~", ".nan", "[[[[]]]]", "&a [*a]"]
    replaced = "\n".join([*lines[:line], f"{key}: {rng.choice(kinds)}", *lines[line + 1 :]])
    circle = "keep: &a [*a]"
    data["recipe"] = rng.choice([bomb, merged, circle, "[" * 30_000, "\0", "", replaced, replaced, replaced, replaced])
    write_json(folder, data)


def change_tensors(folder: Path, rng: random.Random) -> bool:
    """A tensor of another shape, kind or name, without values or with NaN; whether that shows without checksums."""
    path = next(folder.glob("m*.safetensors"))
    tensors = safetensors.torch.load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    how = rng.choice(["more", "less", "flat", "kind", "nan", "gone", "renamed", "extra", "swapped", "none"])
    if how == "gone":
        del tensors[name]
    elif how == "renamed":
        tensors[name + "x"] = tensors.pop(name)
    elif how == "extra":
        tensors["more"] = torch.zeros(1)
    elif how == "nan":
        tensors[name] = torch.full(tensor.shape, torch.nan)
    elif how == "kind":
        tensors[name] = tensor.to(torch.complex64 if tensor.is_floating_point() else torch.float32)
    elif how == "none":
        tensors[name] = tensor.new_zeros(0)
    elif how == "swapped":
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other].clone(), tensor.clone()
    elif how == "flat":
        tensors[name] = tensor.reshape(-1, 1).clone()
    elif tensor.dim():
        tensors[name] = torch.cat([tensor, tensor[:1]]) if how == "more" else tensor[1:].clone()
    safetensors.torch.save_file(tensors, path)
    return how != "swapped" and name != "mask"


def sign(folder: Path) -> None:
    """Checksums that fit what is there now, as somebody would write them who means harm."""
    path = folder / "plan.json"
    data = json.loads(path.read_text())
    data["sha256"] = {p.name: digest_file(p) for p in folder.glob("*.safetensors")} | {
        "plan.json": digest_document(data)
    }
    path.write_text(json.dumps(data))


CHANGES = (change_bytes, change_values, change_values, change_files, change_recipe, change_tensors)


def damage(folder: Path, rng: random.Random) -> str:
    """What was done, in words."""
    change = rng.choice(CHANGES)
    shows = change(folder, rng)
    if change in (change_values, change_recipe, change_tensors) and shows is not False and rng.random() < 0.6:
        try:
            sign(folder)
        except (ValueError, TypeError, AttributeError, RecursionError):
            return change.__name__
        return f"{change.__name__}, signed"
    return change.__name__


# ---- what a network is ----------------------------------------------------------------------------------------------


def bits(tensor: Tensor) -> tuple[Any, ...]:
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
    )


def portrait(network: nn.Module) -> dict[str, Any]:
    """Everything that a network is: modules, attributes, tensors to the bit, ties."""
    tensors = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    hidden = ("_parameters", "_buffers", "_modules")
    return {
        "modules": {
            name: (type(m), {k: repr(v) for k, v in m.__dict__.items() if k not in hidden})
            for name, m in network.named_modules()
        },
        "tensors": {n: (bits(t), t.requires_grad, t.grad is None, first.setdefault(id(t), n)) for n, t in tensors},
    }


def difference(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [f"{part} {k}" for part in a for k in a[part].keys() | b[part].keys() if a[part].get(k) != b[part].get(k)]


# ---- the laws -------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """How damaged folders were read: exactly, refused, wrong or with a crash."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def judge(
        self,
        what: str,
        read: Callable[[], object],
        when_refused: Callable[[], object] = lambda: None,
    ) -> None:
        """Read one folder; `read` gives what is wrong with what was loaded, `when_refused` what changed still."""
        self.counts["tried"] += 1
        try:
            wrong = read()
        except IntrafusionError as error:
            self.counts["refused"] += 1
            if changed := when_refused():
                self.failures.append(f"{what}: refused, but changed {changed}: {error}")
        except Exception as error:
            self.counts["crashed"] += 1
            self.failures.append(f"{what}: {type(error).__name__}: {error}"[:400])
        else:
            self.counts["wrong" if wrong else "right"] += 1
            self.failures += [f"{what}: loaded, but wrong in {wrong}"] if wrong else []

    def show(self, title: str) -> None:
        print(f"\n{title}: {dict(self.counts)}")
        assert self.failures == [], "\n".join(self.failures)


def misread_network(folder: Path, network: nn.Module, expected: dict[str, Any]) -> list[str]:
    with warnings.catch_warnings(action="ignore", category=IntrafusionWarning):  # of a signed list of layers
        load(folder, network)
    return difference(expected, portrait(network))


def misread_alone(folder: Path, saved: nn.Module) -> list[str]:
    with warnings.catch_warnings(action="ignore", category=IntrafusionWarning):
        found = portrait(load(folder))["tensors"]
    return [name for name, tensor in portrait(saved)["tensors"].items() if found[name][0] != tensor[0]]


def misread_plan(folder: Path, plan: Plan, done: str) -> str:
    found = load_plan(folder)
    maps = found.maps.items()
    sound = found == plan or (done.endswith("signed") and all(m.merge.isfinite().all() for _, m in maps))
    return "" if sound else "its plan"


def test_damaged_networks_load_exactly_or_are_refused(folders: list[Folder], tmp_path: Path) -> None:
    tally = Tally()
    for seed in range(160 * TIMES):
        rng = random.Random(seed)
        source, original, saved = rng.choice(folders)
        folder = tmp_path / "net"
        shutil.copytree(source, folder)
        done = damage(folder, rng)
        network = original()
        before, expected = portrait(network), portrait(saved)
        again = partial(misread_network, folder, network, expected)
        tally.judge(f"{seed} ({done})", again, lambda n=network, b=before: difference(b, portrait(n)))
        shutil.rmtree(folder)
    tally.show("networks")
    assert tally.counts["right"] > 4 * TIMES
    assert tally.counts["refused"] > 80 * TIMES


def change_record(folder: Path, rng: random.Random) -> None:
    """What the folder says of its origin: other values anywhere in it."""
    data = json.loads((folder / "plan.json").read_text())
    key = rng.choice(["source", "source", "source", "original", "program", "made_with", "date"])
    for _ in range(rng.randint(1, 2)):
        container, entry = rng.choice([(data, key), *places(data.get(key))])
        with contextlib.suppress(KeyError, IndexError, TypeError):  # a part of what was changed before
            container[entry] = odd(rng)
    write_json(folder, data)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, nn.Module]]:
    """Folders that name their network, and what they hold: of the zoo, and of transformers where it is installed."""
    root, made = tmp_path_factory.mktemp("alone"), []
    networks = {"zoo": (zoo.build("digits_resnet"), torch.randn(2, 1, 8, 8))}
    if importlib.util.find_spec("transformers"):
        transformers = import_transformers()
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
        config = transformers.BertConfig(**sizes, vocab_size=50, max_position_embeddings=16)
        networks["hf"] = (transformers.BertForSequenceClassification(config).eval(), torch.arange(10).reshape(2, 5))
    for name, (network, x) in networks.items():
        small = compress(network, x if name == "zoo" else {"input_ids": x}, 0.5)
        small.save(root / name)
        load(root / name)
        made.append((root / name, small.model))
    return made


def test_damaged_folders_that_load_alone_load_exactly_or_are_refused(
    alone: list[tuple[Path, nn.Module]], tmp_path: Path
) -> None:
    tally = Tally()
    for seed in range(60 * TIMES):
        rng = random.Random(seed)
        source, saved = rng.choice(alone)
        folder = tmp_path / "net"
        shutil.copytree(source, folder)
        if rng.random() < 0.7:
            change_record(folder, rng)
            done = "change_record"
            with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
                sign(folder)
        else:
            done = damage(folder, rng)
        tally.judge(f"{seed} ({done})", partial(misread_alone, folder, saved))
        shutil.rmtree(folder)
    tally.show("networks that name themselves")
    assert tally.counts["refused"] > 15 * TIMES
    assert tally.counts["right"] > 5 * TIMES


def test_damaged_plans_load_exactly_or_are_refused(tmp_path: Path) -> None:
    plan = compress(Net(), X, {"stem": 0.5, "*": 0.1}).plan
    save_plan(plan, tmp_path / "plan")
    assert load_plan(tmp_path / "plan") == plan
    tally = Tally()
    for seed in range(80 * TIMES):
        rng = random.Random(seed)
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "plan", folder)
        done = damage(folder, rng)
        tally.judge(f"{seed} ({done})", partial(misread_plan, folder, plan, done))
        shutil.rmtree(folder)
    tally.show("plans")
    assert tally.counts["refused"] > 40 * TIMES
