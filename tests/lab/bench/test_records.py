"""Records survive kills and know what was measured already."""

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


def test_done_knows_equal_settings_in_any_order():
    assert key_of("sweep", {"group": "conv1", "keep": 0.9}) in finished_keys([record(0.9)])
    assert key_of("sweep", {"group": "conv1", "keep": 0.8}) not in finished_keys([record(0.9)])


def test_the_environment_names_versions_and_machine():
    environment = Record("sweep", {}, {}).environment
    assert {"versions", "cores", "threads", "time"} <= environment.keys()
    assert environment["versions"]["torch"]
