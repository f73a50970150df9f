"""One self-contained page out of records, or of a saved folder: figures, tables and the exact recipe; no network."""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template
from typing import Any

from intrafusion.brief import show_briefly
from intrafusion.errors import ArgumentError
from intrafusion.io.atomic import atomic_file
from intrafusion.lab.bench.records import WHOLE
from intrafusion.lab.report import figures as figures_of
from intrafusion.lab.report.figures import Figure, Variant
from intrafusion.lab.report.records import (
    FUSED,
    PRUNED,
    SCOPES,
    Cell,
    Measured,
    Table,
    accuracy_records,
    comparison,
    drifts,
    format_percent,
    group_by,
    latest_records,
    method_label,
    original_records,
    reduction_records,
    significance,
    stages,
)
from intrafusion.measure.closeness import OUTPUT_ERROR
from intrafusion.measure.comparison import Comparison
from intrafusion.measure.size import Size
from intrafusion.names import name_some
from intrafusion.plan import Decision, Plan, list_layers
from intrafusion.table import explain_words

_HERE = Path(__file__).parent
_MARKUP = {"name", "text", "x", "y"}  # strings in which Plotly looks for markup
_LONG = 20  # rows after which a table scrolls
_WRAPPED = 30  # letters after which the text of a cell goes on in a new line


@dataclass(frozen=True)
class Section:
    """A part of the page: a figure, a table, or ready-made HTML below them."""

    name: str
    title: str
    text: str = ""
    figure: Figure | None = None
    table: Table | None = None
    body: str = ""

    __repr__ = show_briefly


@dataclass(frozen=True)
class Page:
    """All that a page shows.

    Attributes:
        about: what it is made of, above the title.
        lead: the outcome in a sentence or two.
        tiles: (number, what it is).
        methods: those that can be switched on and off.
    """

    title: str
    about: str
    lead: str
    tiles: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    methods: tuple[str, ...] = ()
    footer: str = ""

    __repr__ = show_briefly


def write(page: Page, path: Path) -> None:
    """Write the page; the file appears complete or not at all.

    Raises:
        FolderError: the path is a folder.
    """
    text = render(page)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def render(page: Page) -> str:
    drawn = [s.figure for s in page.sections if s.figure is not None]
    data = {"methods": list(page.methods), "figures": [_figure_data(f) for f in drawn]}
    return Template((_HERE / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(page.title),
        about=f" · {_e(page.about)}" if page.about else "",
        lead=html.escape(page.lead),
        tiles="\n".join(f'<div class="tile"><b>{_e(b)}</b><span>{_e(a)}</span></div>' for b, a in page.tiles),
        links="\n".join(f'<a href="#{_e(s.name)}">{_e(s.title)}</a>' for s in page.sections),
        toggles=_toggles(page.methods) if drawn else "",
        sections="\n".join(map(_section, page.sections)),
        figures=script_json(data),
        plotly=f'<script type="text/plain" id="plotly">{_packed_plotly()}</script>' if drawn else "",
        footer=html.escape(page.footer),
        css=(_HERE / "page.css").read_text(encoding="utf-8"),
        js=(_HERE / "page.js").read_text(encoding="utf-8"),
    )


def _e(text: object) -> str:
    return html.escape(str(text))


def _packed_plotly() -> str:
    """The plotting library, compressed for the page to unpack: as it is, it would be most of the page."""
    return base64.b64encode((_HERE / "plotly-cartesian.min.js.gz").read_bytes()).decode("ascii")


def script_json(data: Any) -> str:
    """JSON that no HTML parser reads as anything else; what is not a number becomes null."""
    text = json.dumps(_finite(data), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {k: _finite(v) for k, v in data.items()}
    return [_finite(v) for v in data] if isinstance(data, (list, tuple)) else data


def _figure_data(figure: Figure) -> dict[str, Any]:
    variants = {",".join(map(str, key)): _variant_data(v) for key, v in figure.variants.items()}
    return {"name": figure.name, "variants": variants}


def _variant_data(variant: Variant) -> dict[str, Any]:
    return {"data": [_strip_markup(trace) for trace in variant.data], "layout": variant.layout}


def _strip_markup(trace: Mapping[str, Any]) -> dict[str, Any]:
    """A trace whose names are shown as they are, not read as markup."""
    return {key: _escape_markup(value) if key in _MARKUP else value for key, value in trace.items()}


def _escape_markup(value: Any) -> Any:
    if isinstance(value, str):
        return html.escape(value, quote=False)
    return [_escape_markup(v) for v in value] if isinstance(value, (list, tuple)) else value


def _toggles(methods: Sequence[str]) -> str:
    if len(methods) < 2:
        return ""
    buttons = "".join(
        f'<button type="button" class="toggle" aria-pressed="true" data-method="{_e(m)}">'
        f"<i></i>{_e(method_label(m))}</button>"
        for m in methods
    )
    group = f'<div role="group" aria-label="Methods"><span class="name">Methods</span>{buttons}</div>'
    return f'<div class="toggles">{group}</div>'


def _section(s: Section) -> str:
    parts = [f'<section id="{_e(s.name)}">', f"<h2>{_e(s.title)}</h2>"]
    parts += [f"<p>{_e(s.text)}</p>"] if s.text else []
    parts += [_figure_html(s.figure)] if s.figure else []
    parts += [_table_html(s.table)] if s.table else []
    return "\n".join([*parts, s.body, "</section>"])


def _figure_html(figure: Figure) -> str:
    menus = "".join(
        f"<label{'' if len(choice.values) > 1 else ' hidden'}>{_e(choice.name)} <select>"
        + "".join(f'<option value="{i}">{_e(value)}</option>' for i, value in enumerate(choice.values))
        + "</select></label>"
        for choice in figure.choices
    )
    plot = f'<div class="plot" id="plot-{_e(figure.name)}" role="img" aria-label="{_e(figure.title)}"></div>'
    return f'<div class="figure" data-figure="{_e(figure.name)}"><div class="menus">{menus}</div>{plot}</div>'


def _table_html(table: Table) -> str:
    number = lambda i: "number" if i in table.numeric else ""  # noqa: E731
    head = "".join(
        f'<th class="{number(i)}"><button type="button">{_e(name)}</button></th>' for i, name in enumerate(table.header)
    )
    rows = "".join(
        f"<tr>{''.join(_cell_html(cell, i, table) for i, cell in enumerate(row))}</tr>\n" for row in table.rows
    )
    kind = "scroll long" if len(table.rows) > _LONG else "scroll"
    return (
        f'<div class="scroller"><div class="{kind}" tabindex="0">'
        f'<table class="sortable" aria-label="{_e(table.title)}">'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div></div>"
    )


def _cell_html(cell: Cell, column: int, table: Table) -> str:
    classes = ["number"] if column in table.numeric else []
    if table.header[column] == "gain" and cell.value:
        classes.append("up" if cell.value > 0 else "down")
    if len(cell.text) > _WRAPPED:
        classes.append("wide")
    value = f' data-value="{cell.value!r}"' if cell.value is not None and math.isfinite(cell.value) else ""
    return f'<td class="{" ".join(classes)}"{value}>{_breakable(cell.text)}</td>'


def _breakable(text: str) -> str:
    """Names may go on in a new line after a dot."""
    return re.sub(r"(?<=\w)\.(?=\w)", ".<wbr>", _e(text))


# ---- out of records -------------------------------------------------------------------------------------------------


def records_page(
    records: Sequence[Measured], *, sources: Sequence[str] = (), sheet: str | None = None, version: str = ""
) -> Page:
    """The page of these records; it has the sections that they allow.

    Args:
        sources: names of the files.
        sheet: a contact sheet of images, as a data address.
    Raises:
        ArgumentError: there are no records.
    """
    if not records:
        raise ArgumentError("report: expected records, got none; give files that an experiment wrote.")
    drawn = figures_of.figures(records)
    table = comparison(accuracy_records(records))
    sections = [
        _from_figure(drawn.get("curves")),
        Section("accuracy", "Every reduction", _ACCURACY + (_GAIN if "gain" in table.header else ""), table=table)
        if table
        else None,
        _from_figure(drawn.get("gains")),
        _from_figure(drawn.get("sizes")),
        _from_figure(drawn.get("marginals"), significance(records)),
        _from_figure(drawn.get("training"), stages(records)),
        _from_figure(drawn.get("drift"), drifts(records)),
        _from_figure(drawn.get("landscape")),
        _sheet_section(sheet) if sheet else None,
        _reproduce(records, sources),
    ]
    networks = list(dict.fromkeys(r.setting["network"] for r in records if "network" in r.setting))
    names = ", ".join(dict.fromkeys(r.experiment for r in records))
    title = f"{networks[0]} and {len(networks) - 1} more" if len(networks) > 3 else ", ".join(networks) or names
    tiles = (*tiles_of(records), (f"{len(latest_records(records)):,}", "measurements"))
    found = tuple(s for s in sections if s is not None)
    switchable = tuple(figures_of.methods_of(records)) if any(f.name in _SWITCHABLE for f in drawn.values()) else ()
    return Page(title, names, _lead_of(records), tiles, found, switchable, _footer_of(records, version))


_ACCURACY = "Accuracy on the test images; a click on a heading sorts."
_GAIN = " Gain is fused minus pruned, in points."
_SWITCHABLE = {"curves", "drift", "training", "marginals"}


def _from_figure(figure: Figure | None, table: Table | None = None) -> Section | None:
    if figure is None and table is None:
        return None
    if figure is None:
        assert table is not None
        return Section(table.title.lower().replace(" ", "-"), table.title, table=table)
    return Section(figure.name, figure.title, figure.text, figure, table)


def _sheet_section(sheet: str) -> Section:
    image = f'<img class="sheet" alt="A grid of small images" src="{_e(sheet)}">'
    return Section("images", "Images", _IMAGES, body=image)


_IMAGES = (
    "Those given with this report, such as images made from the network alone; each at its full range of brightness."
)


def _best_gain(records: Iterable[Measured]) -> tuple[Measured, Measured] | None:
    """The pruned and the fused record of the largest gain, of whole networks if there are any."""
    records = latest_records(records)
    found = [
        r for r in reduction_records(accuracy_records(records) or records) if r.setting["method"] in (PRUNED, FUSED)
    ]
    whole = [r for r in found if r.setting["group"] in SCOPES]
    key = lambda r: (r.experiment, *sorted((k, str(v)) for k, v in r.setting.items() if k != "method"))  # noqa: E731
    pairs = [{r.setting["method"]: r for r in part} for part in group_by(whole or found, key).values()]
    both = [(p[PRUNED], p[FUSED]) for p in pairs if len(p) == 2]
    return max(both, key=lambda p: p[1].result["accuracy"] - p[0].result["accuracy"], default=None)


def _lead_of(records: Sequence[Measured]) -> str:
    pair = _best_gain(records)
    if pair is None:
        return f"{len(latest_records(records)):,} measurements."
    pruned, fused = pair
    setting, before = fused.setting, original_records(records).get(fused.setting["network"])
    where = "the whole network" if setting["group"] == WHOLE else setting["group"]
    size = ""
    if "params_before" in fused.result:
        size = f" ({100 * fused.result['params'] / fused.result['params_before']:.0f} % of the parameters)"
    trained = " After fine-tuning," if "stages" in fused.result else ""
    original = f" The original has {format_percent(before.result['accuracy']).text}." if before else ""
    start = f"{trained} with" if trained else "With"
    return (
        f"{start.strip()} {100 * setting['keep']:g} % of the channels of {where} kept{size}, "
        f"{setting['network']} has {format_percent(fused.result['accuracy']).text} accuracy when fused and "
        f"{format_percent(pruned.result['accuracy']).text} when pruned.{original}"
    )


def tiles_of(records: Sequence[Measured]) -> list[tuple[str, str]]:
    tiles = []
    before = original_records(records)
    for network, record in list(before.items())[:4]:
        about = "original accuracy" if len(before) == 1 else f"original {network}"
        tiles.append((format_percent(record.result["accuracy"]).text, about))
    pair = _best_gain(records)
    if pair is not None:
        gain = 100 * (pair[1].result["accuracy"] - pair[0].result["accuracy"])
        where = f"{pair[1].setting['group']}, keep {100 * pair[1].setting['keep']:g} %"
        tiles.append((f"{gain:+.1f} points", f"largest gain of fusing over pruning ({where})"))
    images = {r.setting["images"] for r in records if "images" in r.setting}
    if images:
        few, many = (f"{end(images):,}" for end in (min, max))
        tiles.append((many if few == many else f"{few} to {many}", "test images"))
    return tiles


def _reproduce(records: Sequence[Measured], sources: Sequence[str]) -> Section:
    """Commands, recipes, versions and machines."""
    commands = list(dict.fromkeys(r.environment["command"] for r in records if "command" in r.environment))
    parts = []
    if commands:
        parts.append("<h3>Commands</h3>" + "".join(f"<pre>{_e(c)}</pre>" for c in commands))
    parts.append("<h3>Environment</h3>" + _definitions(_environment_of(records, sources)))
    recipes = {}
    for r in records:
        if "recipe" in r.result:
            recipes.setdefault((r.experiment, r.setting["method"]), r)
    if recipes:
        parts.append("<h3>Recipes</h3>")
        parts += [_recipe_html(key, r) for key, r in recipes.items()]
    return Section("reproduce", "How to reproduce", _REPRODUCE, body="\n".join(parts))


_REPRODUCE = "Each record holds its setting, its recipe, its seed and the versions that it was measured with."


def _recipe_html(key: tuple[str, str], record: Measured) -> str:
    where = {k: v for k, v in record.setting.items() if k != "method"}
    what = ", ".join(f"{k} {v}" for k, v in where.items())
    return (
        f"<details><summary>{_e(key[0])}: {_e(method_label(key[1]))}</summary>"
        f"<p>The first of its records: {_e(what)}</p><pre>{_e(record.result['recipe'].strip())}</pre></details>"
    )


def _environment_of(records: Sequence[Measured], sources: Sequence[str]) -> dict[str, str]:
    seen = [r.environment for r in records]
    times = sorted(str(s["time"]) for s in seen if "time" in s)
    versions = [", ".join(f"{k} {v}" for k, v in s["versions"].items()) for s in seen if "versions" in s]
    machines = [
        f"{s['machine']}, {s['cores']} cores, {s['threads']} threads, {s['device']}" for s in seen if "device" in s
    ]
    found = {
        "Records": ", ".join(sources),
        "Measured": " to ".join(dict.fromkeys([times[0], times[-1]])) if times else "",
        "Python": ", ".join(dict.fromkeys(str(s["python"]) for s in seen if "python" in s)),
        "Versions": "; ".join(dict.fromkeys(versions)),
        "Machine": "; ".join(dict.fromkeys(machines)),
        "Seeds": ", ".join(map(str, sorted({r.setting["seed"] for r in records if "seed" in r.setting}))),
        "Weights": ", ".join(dict.fromkeys(_weights(r) for r in records if "weights" in r.setting)),
    }
    return {name: text for name, text in found.items() if text}


def _weights(record: Measured) -> str:
    return f"{record.setting['network']} {record.setting['weights']}"


def _definitions(pairs: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{_e(name)}</dt><dd>{_e(text)}</dd>" for name, text in pairs.items()) + "</dl>"


def _footer_of(records: Sequence[Measured], version: str) -> str:
    times = sorted(str(r.environment["time"]) for r in records if "time" in r.environment)
    last = f", last measured {times[-1]}" if times else ""
    return f"intrafusion {version}{last}. This page is complete in itself and opens without a network."


# ---- out of a saved folder ------------------------------------------------------------------------------------------


def plan_page(
    plan: Plan,
    before: Size | None,
    after: Size | None,
    *,
    folder: str,
    sheet: str | None = None,
    version: str = "",
    restored: Sequence[str] = (),
    comparison: Comparison | None = None,
    loads_alone: bool = False,
) -> Page:
    """The page of a network that was made smaller and saved.

    Args:
        restored: what was done against the loss.
        comparison: what both networks take, and how close their outputs are.
        loads_alone: whether the folder tells what network it is of.
    """
    reduced = [d for d in plan.decisions if d.reduced]
    tiles = [(f"{len(reduced)} of {len(plan.decisions)}", "groups reduced")]
    lead = f"{len(reduced)} of {len(plan.decisions)} channel groups were reduced."
    if before and after:
        tiles = (
            [
                (
                    format_percent(after.params / before.params).text,
                    f"of the parameters: {before.params:,} → {after.params:,}",
                ),
                (format_percent(after.macs / before.macs).text, f"of the MACs: {before.macs:,} → {after.macs:,}"),
                *tiles,
            ]
            if before.params and before.macs
            else tiles
        )
        lead = f"{before.params:,} parameters became {after.params:,}. {lead}"
    tiles = [*tiles, *_compared_tiles(comparison)]
    bars = figures_of.sizes_of_plan(plan.decisions)
    given = "" if loads_alone else ", OriginalNetwork"
    of_what = "" if loads_alone else "  # the original class, a factory, or an instance"
    load = f"model = intrafusion.load({folder!r}{given}){of_what}"
    body = (
        f"<h3>Recipe</h3><pre>{_e(plan.recipe.to_yaml().strip())}</pre>"
        f"<h3>Load it</h3><pre>import intrafusion\n{_e(load)}</pre>"
        f"<h3>Make it again</h3><pre>intrafusion compress NETWORK --recipe {_e(folder)}/recipe.yaml -o FOLDER</pre>"
    )
    sections = [
        _compared_section(comparison),
        replace(bars_section, table=_plan_table(plan.decisions), text=f"{bars_section.text} {_explain_how(plan)}")
        if (bars_section := _from_figure(bars))
        else None,
        Section("restored", "Restored without training", _ERROR, body=_notes(restored)) if restored else None,
        _sheet_section(sheet) if sheet else None,
        Section("notes", "Notes", body=_notes(plan.warnings)) if plan.warnings else None,
        Section("reproduce", "How to reproduce", body=body),
    ]
    found = tuple(s for s in sections if s is not None)
    footer = f"intrafusion {version}. This page is complete in itself and opens without a network."
    return Page(Path(folder).name, "a smaller network", lead, tuple(tiles), found, (), footer)


_ERROR = f"The output error is {OUTPUT_ERROR}."


def _compared_tiles(comparison: Comparison | None) -> list[tuple[str, str]]:
    """How fast the smaller network is, and how far its outputs are off."""
    if comparison is None:
        return []
    tiles, held_out = [], comparison.held_out
    if comparison.speedup is not None:
        tiles.append((f"{comparison.speedup:.2f} ×", "as fast as the original, on the machine it was made on"))
    if held_out is not None:
        on = f"{held_out.on}, unseen by the solver" if held_out.unseen else f"the {held_out.on} it was solved on"
        tiles.append((format_percent(held_out.after.error).text, f"of their variance is how far outputs differ ({on})"))
    return tiles


def _compared_section(comparison: Comparison | None) -> Section | None:
    if comparison is None:
        return None
    failed = "" if comparison.failed is None else f"<p>{_e(comparison.failed)}</p>"
    return Section("compared", "Before and after", body=_definitions(dict(comparison.figures())) + failed)


def _explain_how(plan: Plan) -> str:
    """What the words in the column mean, as sentences."""
    used = [d.mixing.partition(":")[0] if d.reduced else "kept" for d in plan.decisions]
    return " ".join(f"{part[0].upper()}{part[1:]}." for part in explain_words(used).split("; ") if part)


def _plan_table(decisions: Sequence[Decision]) -> Table:
    """One row per group, as it stands in the plan."""
    rows = tuple(
        (
            Cell(d.group),
            Cell(str(d.n), d.n),
            Cell(str(d.m), d.m),
            Cell(f"{100 * d.m / d.n:.0f} %", d.m / d.n),
            Cell(d.mixing if d.reduced else "kept"),
            Cell(name_some(list_layers(d)) if d.reduced else d.reason or "all kept"),
        )
        for d in decisions
    )
    header = ("group", "before", "after", "kept", "how", "layers or reason")
    return Table("Groups", header, rows, frozenset({1, 2, 3}))


def _notes(warnings: Iterable[str]) -> str:
    """Sentences; their arrows are not broken at the end of a line."""
    items = (_e(warning).replace("-&gt;", "→") for warning in warnings)
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"
