"""Measurements as records: appended to JSONL files, never typed by hand; sweeps that survive a kill."""

from intrafusion.bench.cluster import Cluster
from intrafusion.bench.records import Record, append, done, environment, read
from intrafusion.bench.sweep import sweep

__all__ = ["Cluster", "Record", "append", "done", "environment", "read", "sweep"]
