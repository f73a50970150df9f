"""Records survive kills and know what was measured already."""

import resource
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from intrafusion.errors import FolderError
from intrafusion.lab.bench import Record, append_record, finished_keys, read_records
from intrafusion.lab.bench.records import key_of


def record(keep: float, accuracy: float = 0.5) -> Record:
    return Record("sweep", {"keep": keep, "group": "conv1"}, {"accuracy": accuracy}, {"time": "now"})


def test_what_is_appended_is_read_back(tmp_path):
    path = tmp_path / "records" / "sweep.jsonl"
    append_record(path, record(0.9, 0.8))
    append_record(path, record(0.7))
    assert read_records(path) == [record(0.9, 0.8), record(0.7)]


def test_a_line_cut_short_is_passed_over_and_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "sweep.jsonl"
    append_record(path, record(0.9))
    with path.open("a") as file:
        file.write('{"experiment": "swe')
    append_record(path, record(0.7))
    assert read_records(path) == [record(0.9), record(0.7)]


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"experiment": "x", "setting": 3, "result": {}, "environment": {}}',
        b'{"experiment": ["x"], "setting": {}, "result": {}, "environment": {}}',
        b'{"experiment": "x", "setting": {}, "result": null, "environment": {}}',
        b'{"experiment": "x", "setting": {}, "result": {"a": ' + b"9" * 5000 + b"}}",
        b"\xff\xfe\x00",
        b"null",
    ],
    ids=range(7),
)
def test_lines_that_are_no_records_are_passed_over(tmp_path, line):
    path = tmp_path / "sweep.jsonl"
    append_record(path, record(0.9))
    with path.open("ab") as file:
        file.write(line + b"\n")
    append_record(path, record(0.7))
    assert read_records(path) == [record(0.9), record(0.7)]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "sweep.jsonl"
    append_record(path, record(0.9))
    before = path.read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    heard = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, old[1]))
        with pytest.raises(FolderError, match="sweep.jsonl: cannot be written"):
            append_record(path, record(0.7))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, heard)
    assert path.read_bytes() == before
    append_record(path, record(0.7))
    assert read_records(path) == [record(0.9), record(0.7)]


def test_many_that_write_at_once_lose_no_line(tmp_path):
    path = tmp_path / "sweep.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: append_record(path, record(i)), range(64)))
    assert sorted(r.setting["keep"] for r in read_records(path)) == list(range(64))


def test_done_knows_equal_settings_in_any_order():
    assert key_of("sweep", {"group": "conv1", "keep": 0.9}) in finished_keys([record(0.9)])
    assert key_of("sweep", {"group": "conv1", "keep": 0.8}) not in finished_keys([record(0.9)])


def test_the_environment_names_versions_and_machine():
    environment = Record("sweep", {}, {}).environment
    assert {"versions", "cores", "threads", "time"} <= environment.keys()
    assert environment["versions"]["torch"]
