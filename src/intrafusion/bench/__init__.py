"""Measurements as records: appended to JSONL files, never typed by hand."""

from intrafusion.bench.records import Record, append, done, environment, read

__all__ = ["Record", "append", "done", "environment", "read"]
