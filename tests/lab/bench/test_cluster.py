"""Sweeps on Ray give the records of a sweep here, also when a worker dies."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest

from intrafusion.errors import IntrafusionError, ModelError
from intrafusion.lab.bench import Cluster, read_records, sweep
from intrafusion.lab.bench.cluster import connect

SETTINGS = [{"i": i} for i in range(4)]


def content(records):
    return [(r.experiment, r.setting, r.result) for r in records]


def test_the_same_records_come_out(one_core, tmp_path):
    offset, process = 0.1, os.getpid()

    def run(setting):
        return {"half": setting["i"] / 2 + offset}

    here = sweep("halves", SETTINGS, run, tmp_path / "here.jsonl")
    there = sweep("halves", SETTINGS, run, tmp_path / "there.jsonl", cluster=one_core)
    assert content(there) == content(here)
    assert {r.environment["threads"] for r in there} == {1}
    far = sweep("far", SETTINGS, lambda s: {"far": os.getpid() != process}, tmp_path / "far.jsonl", cluster=one_core)
    assert [r.result for r in far] == [{"far": True}] * 4


def test_a_worker_that_dies_is_replaced_and_its_setting_tried_again(one_core, tmp_path):
    first_try, log = tmp_path / "tried", tmp_path / "log"

    def run(setting):
        with log.open("a") as file:
            file.write(f"{setting['i']}\n")
        if setting["i"] == 1 and not first_try.exists():
            first_try.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"i": setting["i"]}

    records = sweep("dying", SETTINGS, run, tmp_path / "r.jsonl", cluster=one_core)
    assert [r.result["i"] for r in records] == [0, 1, 2, 3]
    assert len(read_records(tmp_path / "r.jsonl")) == 4
    assert sorted(log.read_text().split()) == ["0", "1", "1", "2", "3"]


def test_a_worker_that_always_dies_is_given_up_and_the_others_are_kept(one_core, tmp_path):
    def run(setting):
        if setting["i"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"i": setting["i"]}

    with pytest.raises(IntrafusionError, match=r"1 of 4 settings failed.*\{'i': 1\}.*the worker was lost"):
        sweep("dead", SETTINGS, run, tmp_path / "r.jsonl", cluster=Cluster(cores=1, retries=0))
    assert {r.result["i"] for r in read_records(tmp_path / "r.jsonl")} == {0, 2, 3}


def test_an_error_of_a_setting_is_told_and_not_tried_again(one_core, tmp_path):
    log = tmp_path / "log"

    def run(setting):
        if setting["i"] == 2:
            with log.open("a") as file:
                file.write("tried\n")
            raise ModelError("the network is too small")
        return {}

    with pytest.raises(IntrafusionError, match=r"1 of 4 .*ModelError: the network is too small") as caught:
        sweep("failing", SETTINGS, run, tmp_path / "r.jsonl", cluster=one_core)
    assert isinstance(caught.value.__cause__, ModelError)
    assert log.read_text() == "tried\n"


def test_a_module_that_workers_cannot_import_travels_along(one_core, tmp_path, monkeypatch):
    module = ModuleType("_a_module_of_the_user")
    exec("factor = 3\ndef run(setting):\n    return {'i': factor * setting['i']}", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    records = sweep("user", SETTINGS, module.run, tmp_path / "r.jsonl", cluster=Cluster(by_value=(module,)))
    assert [r.result["i"] for r in records] == [0, 3, 6, 9]


def test_a_running_ray_is_used_and_left_running(one_core):
    import ray

    with connect(Cluster(cores=7)) as found:
        assert found.cluster_resources()["CPU"] == 1
    assert ray.is_initialized()


def test_without_ray_the_message_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(IntrafusionError, match=r"pip install 'intrafusion\[ray\]'"):
        sweep("halves", SETTINGS, lambda s: {}, tmp_path / "r.jsonl", cluster=Cluster())


def test_a_cluster_that_does_not_answer_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ray = pytest.importorskip("ray", reason="needs ray: pip install 'intrafusion[ray]'")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)

    def init(**options: object) -> None:
        raise ConnectionError(f"nobody at {options['address']}.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(IntrafusionError, match=r"Ray \(far:1\) cannot be started or reached: nobody at far:1\."):
        sweep("halves", SETTINGS, lambda s: {}, tmp_path / "r.jsonl", cluster=Cluster("far:1"))
