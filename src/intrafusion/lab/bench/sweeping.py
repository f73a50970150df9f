"""A sweep: measure every setting once, here or on Ray, and lose nothing to a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from intrafusion.errors import IntrafusionError
from intrafusion.lab.bench.cluster import Cluster
from intrafusion.lab.bench.records import Record, append_record, environment, key_of, read_records
from intrafusion.progress import Progress, silent

Setting = Mapping[str, Any]
"""What was varied, of values that JSON has: it identifies a measurement."""

SweepOutcome = Mapping[str, Any]
"""What was measured, of values that JSON has."""

RunSetting = Callable[[Setting], SweepOutcome]


def sweep(
    experiment: str,
    settings: Iterable[Setting],
    run: RunSetting,
    path: Path,
    *,
    cluster: Cluster | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> list[Record]:
    """Measure the settings that the file has no record of, and return the records of all of them, in their order.

    Each result is appended to the file as soon as it is there, in one write: a kill at any point loses at most what was
    being measured, and the next call goes on from there. A setting that fails does not stop the others; it is not
    recorded, so the next call tries it again.

    Args:
        run: setting -> result; with a cluster it travels to the workers, so it must pickle.
        cluster: where to run; None for this process, one setting after another.
        provenance: more to note in the `environment` of each record, such as the command.
    Raises:
        IntrafusionError: settings failed; names the first ones, with their errors.
        ValueError: a setting stands twice, or has values that JSON does not have.
    """
    wanted = _index_by_key(experiment, settings)
    finished = {record.key for record in read_records(path)}
    todo = {key: setting for key, setting in wanted.items() if key not in finished}
    failed: list[tuple[Setting, Exception]] = []
    progress(experiment, 0, len(todo))
    for count, (setting, outcome, where) in enumerate(_outcomes(run, list(todo.values()), cluster), 1):
        if isinstance(outcome, Exception):
            failed.append((setting, outcome))
        else:
            append_record(path, Record(experiment, setting, outcome, {**where, **(provenance or {})}))
        progress(experiment, count, len(todo))
    if failed:
        raise IntrafusionError(_describe_failure(failed, len(wanted), path)) from failed[0][1]
    measured = {record.key: record for record in read_records(path)}
    return [measured[key] for key in wanted]


def _index_by_key(experiment: str, settings: Iterable[Setting]) -> dict[str, Setting]:
    wanted: dict[str, Setting] = {}
    for setting in settings:
        key = key_of(experiment, setting)
        if key in wanted:
            raise ValueError(f"{experiment}: the setting {dict(setting)} stands twice; leave one of them out.")
        wanted[key] = setting
    return wanted


def _outcomes(
    run: RunSetting, settings: Sequence[Setting], cluster: Cluster | None
) -> Iterator[tuple[Setting, SweepOutcome | Exception, Mapping[str, Any]]]:
    """(setting, result or error, environment it was measured in), in the order in which they are finished."""
    if cluster is not None and settings:
        yield from cluster.outcomes(run, settings)
        return
    for setting in settings:
        yield setting, _attempt(run, setting), environment()


def _attempt(run: RunSetting, setting: Setting) -> SweepOutcome | Exception:
    try:
        return run(setting)
    except Exception as error:
        return error


def _describe_failure(failed: Sequence[tuple[Setting, Exception]], total: int, path: Path, shown: int = 3) -> str:
    first = "; ".join(f"{dict(setting)}: {type(error).__name__}: {error}" for setting, error in failed[:shown])
    more = f"; and {len(failed) - shown} more" if len(failed) > shown else ""
    return f"{len(failed)} of {total} settings failed, the others are in {path}. {first}{more}"
