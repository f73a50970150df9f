"""Measurements as records: appended to JSONL files, never typed by hand; sweeps that survive a kill."""

from intrafusion.lab.bench.cluster import Cluster
from intrafusion.lab.bench.records import Record, append_record, environment, finished_keys, read_records
from intrafusion.lab.bench.sweeping import sweep

__all__ = ["Cluster", "Record", "append_record", "environment", "finished_keys", "read_records", "sweep"]
