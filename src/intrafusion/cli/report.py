"""intrafusion report: records, or a saved folder, as one self-contained page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import intrafusion
from intrafusion.cli.console import working
from intrafusion.cli.inputs import read_images
from intrafusion.cli.inspect import read_done, read_saved
from intrafusion.cli.options import AsJson, ImageFile, Output
from intrafusion.cli.outputs import check_page
from intrafusion.cli.show import print_json, say
from intrafusion.errors import FolderError
from intrafusion.io.folder import is_ours, read_document
from intrafusion.lab.bench import Record, read_records
from intrafusion.lab.report import html
from intrafusion.lab.report.sheet import contact_sheet, data_address

_PAGE = "report.html"


def report(
    sources: Annotated[
        list[Path], typer.Argument(metavar="RECORDS...", help="Files of records (.jsonl), or one saved folder.")
    ],
    output: Output = Path(_PAGE),
    images: ImageFile = None,
    as_json: AsJson = False,
) -> None:
    """Write one page that needs no network: accuracy against size, tables, group sizes, drift, landscape, recipe.

    It has the sections that its records allow; images, such as compress --keep-images writes, are a contact sheet.
    """
    with working():
        check_page(output)
        sheet = data_address(contact_sheet(read_images(images))) if images else None
        page = _page_of(sources, sheet)
        html.write(page, output)
    size = output.stat().st_size
    if as_json:
        sections = [section.name for section in page.sections]
        print_json(
            "report", {"sources": list(map(str, sources)), "output": str(output), "bytes": size, "sections": sections}
        )
        return
    say(f"wrote {output}, {size / 1e6:.1f} MB")


def _page_of(sources: list[Path], sheet: str | None) -> html.Page:
    """Raises FolderError for what holds no records and is no saved folder."""
    if len(sources) == 1 and sources[0].is_dir():
        return page_of_folder(sources[0], sheet)
    records = [record for source in sources for record in _read_record_file(source)]
    names = [source.name for source in sources]
    return html.records_page(records, sources=names, sheet=sheet, version=intrafusion.__version__)


def page_of_folder(folder: Path, sheet: str | None = None) -> html.Page:
    """What was done to a saved network. Raises FolderError for what is no saved folder."""
    if not is_ours(folder):
        raise FolderError(f"{folder}: this folder was not saved by intrafusion; expected one, or files of records.")
    plan, before, after = read_saved(folder)
    data = read_document(folder)
    restored, comparison = read_done(data)
    return html.plan_page(
        *(plan, before, after),
        folder=str(folder),
        sheet=sheet,
        version=intrafusion.__version__,
        restored=restored,
        comparison=comparison,
        loads_alone=bool(data.get("source")),
    )


def _read_record_file(path: Path) -> list[Record]:
    """Raises FolderError for a file that is missing or holds no record."""
    if not path.is_file():
        kind = "this is a folder; give it alone" if path.is_dir() else "there is none"
        raise FolderError(f"{path}: expected a file of records, but {kind}.")
    try:
        found = read_records(path)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FolderError(f"{path}: expected records as JSON lines, got {error}.") from error
    if not found:
        raise FolderError(f"{path}: holds no record; expected what `intrafusion experiment` wrote.")
    return found
