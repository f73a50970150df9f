"""Records as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from intrafusion.cli.show import print_table, say
from intrafusion.lab.bench import Record
from intrafusion.lab.report.records import original_records, tables


def print_records(records: Sequence[Record]) -> None:
    """The accuracy of the originals, then every table that the records allow."""
    for network, record in original_records(records).items():
        say(f"{network}: original {record.result['accuracy']:.1%}, {record.result['params']:,} parameters")
    for table in tables(records):
        say(f"\n{table.title}")
        print_table(table.header, table.texts())
    for record in records[:1]:
        if "corners" in record.result:
            say("accuracy over a plane: the report draws it")
