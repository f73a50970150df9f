"""What the site shows of files that stand elsewhere in the repository, and the links between both.

The README is the first page; the benchmarks' tables, CONTRIBUTING and the CHANGELOG are pages too. A link from a page
to a file that is no page (a script, a licence) becomes its name: the site knows no address of the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/README.md": "examples.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for picture in sorted((ROOT / "benchmarks").glob("*.png")):
        files.append(File.generated(config, picture.name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the repository -> links of the site."""
    own = page.file.src_uri
    place = next((source for source, name in PAGES.items() if name == own), f"docs/{own}")
    return _LINK.sub(lambda found: _relink(found, posixpath.dirname(place), own), markdown)


def _relink(found: re.Match[str], folder: str, own: str) -> str:
    image, text, target, anchor = found[1], found[2], found[3], found[4] or ""
    if not target or "://" in target or target.startswith("mailto:"):
        return found[0]
    path = posixpath.normpath(posixpath.join(folder, target))
    if path in PAGES:
        return f"{image}[{text}]({_from(own, PAGES[path])}{anchor})"
    if path.startswith("docs/"):
        return f"{image}[{text}]({_from(own, path.removeprefix('docs/'))}{anchor})"
    if not (ROOT / path).exists():
        return found[0]  # the strict build tells
    return text


def _from(own: str, page: str) -> str:
    return posixpath.relpath(page, posixpath.dirname(own) or ".")
