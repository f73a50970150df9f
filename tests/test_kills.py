"""Processes killed at random moments, and several that write and read at once: nothing is lost, torn or left over.

`INTRAFUSION_FUZZ=20` kills twenty times as often; with `-s` the counts are shown.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bare import compress
from torch import nn

import intrafusion.io.folder as folders
from intrafusion import Compressed, load
from intrafusion.io.card import is_users_card
from intrafusion.lab.bench import append_record, read_records, sweep
from intrafusion.lab.zoo.images import Images
from intrafusion.restore import load_images, save_images
from intrafusion.train import Training, train_

TIMES = int(os.environ.get("INTRAFUSION_FUZZ", "1"))
X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


@pytest.fixture(scope="module")
def pair() -> list[Compressed]:
    return [compress(net(), X, keep) for keep in (0.5, 0.25)]


def fork(work: Callable[[], None]) -> int:
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return process


def exit_code(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_at_random(work: Callable[[], None], rng: random.Random, longest: float) -> bool:
    """Work in a process of its own, killed after a random time; whether it was before it had finished."""
    process = fork(work)
    time.sleep(rng.uniform(0, longest))
    os.kill(process, signal.SIGKILL)
    return exit_code(process) == -signal.SIGKILL


def which(folder: Path, pair: list[Compressed]) -> int:
    """Which of the two networks lies there, to the bit."""
    found = load(folder, net, trust_program=True).state_dict()  # then its checksum is looked at too
    for index, small in enumerate(pair):
        state = small.model.state_dict()
        if [t.shape for t in state.values()] == [t.shape for t in found.values()]:
            assert all(torch.equal(state[name], found[name]) for name in state)
            return index
    raise AssertionError("neither of them")


def is_card_of(folder: Path, small: Compressed) -> bool:
    """Whether the card is whole, and that of this network."""
    text = (folder / "README.md").read_text()
    return f" -> {small.after.params:,} (" in text and not is_users_card(folder / "README.md")


def test_kills_while_a_network_is_saved(
    pair: list[Compressed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, counts, folder = random.Random(0), Counter[str](), tmp_path / "net"
    monkeypatch.setattr(folders, "export_network", lambda model, inputs: (str(len(model[0].weight)).encode(), True))
    pair[0].save(folder, program=True)
    (folder / "notes.txt").write_text("precious")

    def save_on_and_on() -> None:
        for turn in range(1, 1000):
            pair[turn % 2].save(folder, program=True)

    for _ in range(12 * TIMES):
        counts["kills"] += kill_at_random(save_on_and_on, rng, 0.2)
        found = which(folder, pair)
        counts[f"network {found} is there"] += 1
        assert (folder / "program.pt2").read_text() == str(len(pair[found].model[0].weight))
        assert is_card_of(folder, pair[found])
        assert (folder / "notes.txt").read_text() == "precious"
    pair[0].save(folder)
    assert os.listdir(tmp_path) == ["net"], "the next save cleans up"
    assert (folder / "notes.txt").read_text() == "precious"
    print(f"\nsave: {dict(counts)}")
    assert counts["kills"] == 12 * TIMES


def test_two_writers_one_killed_now_and_then_and_readers(pair: list[Compressed], tmp_path: Path) -> None:
    """Every read gets a whole network, however often others replace it."""
    rng, folder = random.Random(1), tmp_path / "net"
    pair[0].save(folder)
    (folder / "notes.txt").write_text("precious")
    stop = tmp_path / "stop"

    def write(own: Compressed) -> None:
        while not stop.exists():
            own.save(folder)

    def look(log: Path) -> None:
        counts = Counter[str]()
        while not stop.exists():
            try:
                counts[f"network {which(folder, pair)}"] += 1
                counts["lost"] += not (folder / "notes.txt").exists()
            except Exception as error:
                counts[f"{type(error).__name__}: {error}"] += 1
        log.write_text("\n".join(f"{count} {what}" for what, count in counts.items()))

    writers = [fork(lambda small=small: write(small)) for small in pair]
    readers = [fork(lambda log=tmp_path / f"log{i}": look(log)) for i in range(2)]
    for turn in range(6 * TIMES):
        time.sleep(rng.uniform(0.05, 0.2))
        os.kill(writers[turn % 2], signal.SIGKILL)
        exit_code(writers[turn % 2])
        writers[turn % 2] = fork(lambda small=pair[turn % 2]: write(small))
    stop.touch()
    assert [exit_code(process) for process in (*writers, *readers)] == [0] * 4
    logs = [line.partition(" ") for i in range(2) for line in (tmp_path / f"log{i}").read_text().splitlines()]
    counts = Counter[str]()
    for number, _, what in logs:
        counts[what] += int(number)
    print(f"\nreads while two write and {6 * TIMES} are killed: {dict(counts)}")
    assert counts["network 0"] > 0
    assert counts["network 1"] > 0
    assert +counts == Counter({k: v for k, v in counts.items() if k in ("network 0", "network 1")})
    pair[0].save(folder)
    assert sorted(os.listdir(tmp_path)) == ["log0", "log1", "net", "stop"]
    assert (folder / "notes.txt").read_text() == "precious"


def test_kills_of_sweeps_that_share_a_file(tmp_path: Path) -> None:
    """No record is torn, doubled or lost, and in the end all are there."""
    rng, path, settings = random.Random(2), tmp_path / "r.jsonl", [{"i": i} for i in range(12)]

    def run(setting: dict[str, int]) -> dict[str, int]:
        time.sleep(0.01)
        return {"square": setting["i"] ** 2}

    kills = 0
    for _ in range(6 * TIMES):  # a setting takes 10 ms at least, and two processes share twelve
        other = fork(lambda: sweep("kills", settings, run, path))
        kills += kill_at_random(lambda: sweep("kills", settings, run, path), rng, 0.12)
        assert exit_code(other) == 0, "it takes up what the killed one had claimed"
        assert [r.result["square"] for r in sweep("kills", settings, run, path)] == [i**2 for i in range(12)]
        assert len(read_records(path)) == len({r.key for r in read_records(path)}) <= 13
        path.unlink()
    assert os.listdir(tmp_path) == []
    print(f"\nsweeps: {kills} kills")
    assert kills > TIMES


def test_kills_while_records_are_appended(tmp_path: Path) -> None:
    from intrafusion.lab.bench import Record

    rng, path, whole = random.Random(3), tmp_path / "r.jsonl", 0

    def write() -> None:
        for i in range(10_000):
            append_record(path, Record("kills", {"i": i}, {"text": "x" * rng.randrange(3000)}, {}))

    for _ in range(8 * TIMES):
        assert kill_at_random(write, rng, 0.03)
        found = read_records(path)
        assert len(found) >= whole
        assert len(found) >= len(path.read_bytes().splitlines()) - 8 * TIMES if path.exists() else True
        whole = len(found)


def test_kills_while_a_network_is_trained(tmp_path: Path) -> None:
    """Resumed after every kill, it ends with the weights of a training that nobody killed, to the bit."""
    data = Images(X, (X[:, 0] > 0).long())
    how = Training(epochs=36, batch_size=8)

    def train(folder: Path) -> nn.Module:
        model = net()
        train_(model, data, how, folder=folder)
        return model

    expected = train(tmp_path / "whole")
    begun = time.perf_counter()
    train(tmp_path / "again")
    whole = time.perf_counter() - begun  # on this machine, once all is imported: a fast one ends before a fixed time
    rng, kills = random.Random(4), 0
    for turn in range(TIMES):
        folder = tmp_path / str(turn)
        for _ in range(5):
            kills += kill_at_random(lambda folder=folder: train(folder) and None, rng, whole)
        found = train(folder)
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
        assert os.listdir(folder) == ["checkpoint.pt"], "the next checkpoint cleans up"
        shutil.rmtree(folder)
    print(f"\ntraining: {kills} kills")
    assert kills > 0


def test_kills_while_images_are_written(tmp_path: Path) -> None:
    images, path, rng = torch.randn(2, 64, 3, 8, 8), tmp_path / "images.safetensors", random.Random(5)
    save_images(images[0], path)

    def write() -> None:
        for turn in range(100_000):
            save_images(images[turn % 2], path)

    for _ in range(10 * TIMES):
        assert kill_at_random(write, rng, 0.04)
        assert any(torch.equal(load_images(path), one) for one in images)
    save_images(images[1], path)
    assert os.listdir(tmp_path) == ["images.safetensors"]
    assert torch.equal(load_images(path), images[1])


def test_a_disk_that_fills_at_any_byte_leaves_the_old_network(
    pair: list[Compressed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit on the size of files in place of a small disk."""
    import resource

    from intrafusion.errors import FolderError

    pair[0].save(tmp_path / "net")
    before = {p.name: p.read_bytes() for p in (tmp_path / "net").iterdir()}
    old, heard = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (0, 10, 200, max(len(content) for content in before.values()) // 2):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
            with pytest.raises(FolderError, match="net: cannot be written"):
                pair[1].save(tmp_path / "net")
            with pytest.raises(FolderError, match="checkpoint.pt: cannot be written"):
                train_(net(), Images(X, (X[:, 0] > 0).long()), Training(epochs=1), folder=tmp_path / "train")
            with pytest.raises(FolderError, match="images: cannot be written"):
                save_images(torch.zeros(10_000), tmp_path / "images")
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            assert {p.name: p.read_bytes() for p in (tmp_path / "net").iterdir()} == before
            assert os.listdir(tmp_path) == ["net"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, heard)
