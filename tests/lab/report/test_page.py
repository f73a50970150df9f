"""The page in a real browser: it draws, sorts, switches, fits a phone, prints, and asks nobody for anything."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lab.report.samples import some_of_every_experiment

from intrafusion.lab.bench import Record
from intrafusion.lab.report.html import plan_page, records_page, write
from intrafusion.lab.report.sheet import contact_sheet, data_address
from intrafusion.measure.size import Size
from intrafusion.plan import Decision, Plan
from intrafusion.recipe import Recipe

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'intrafusion[dev]'")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium on the PATH")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield started
        started.close()


class Opened:
    """A page that is open, with all that it said and asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready=true]")

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()

    def names(self, figure: str) -> list[str]:
        """Names in the legend of a figure, which lists what is drawn."""
        return self.page.evaluate(
            f"[...document.querySelectorAll('#plot-{figure} .legendtext')].map(t => t.textContent)"
        )

    def until(self, code: str) -> None:
        """Wait for it to hold; the page's own policy forbids Playwright's way of asking."""
        for _ in range(200):
            if self.page.evaluate(code):
                return
            self.page.wait_for_timeout(50)
        pytest.fail(f"never came true: {code}")

    def number(self, code: str) -> float:
        return self.page.evaluate(code)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    sheet = data_address(contact_sheet(torch.rand(9, 3, 8, 8)))
    write(records_page(some_of_every_experiment(), sources=["r.jsonl"], sheet=sheet, version="1"), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a saved folder: thirty groups with long names, one of them with a long reason."""
    path = tmp_path_factory.mktemp("page") / "folder.html"
    name = "stages.{}.transformer.blocks.attention.output_projection"
    decisions = [
        Decision(name.format(i), 64, 40, (f"{name.format(i)}.weight[0] produces",), "mixed") for i in range(30)
    ]
    reason = "an operation that this library does not follow, aten.something_long.default, " * 4
    decisions.append(Decision("head", 10, 10, ("head.weight[0] produces",), "mixed", reason))
    write(plan_page(Plan(Recipe.of(keep=0.6), tuple(decisions), {}), Size(9, 9), Size(4, 4), folder="small"), path)
    return path


@pytest.fixture(scope="module")
def desktop(browser: Any, path: Path) -> Iterator[Opened]:
    opened = Opened(browser, path, viewport={"width": 1280, "height": 900}, color_scheme="light")
    yield opened
    opened.context.close()


@pytest.fixture(autouse=True)
def quiet(desktop: Opened, path: Path) -> Iterator[None]:
    """Whatever a test did: nothing was said on the console, and nothing but the page itself was asked for."""
    yield
    assert desktop.said == []
    assert desktop.asked == [path.as_uri()]


def test_every_figure_is_drawn(desktop):
    page = desktop
    for figure in ("curves", "gains", "sizes", "marginals", "training", "drift", "landscape"):
        assert page.page.locator(f"#plot-{figure} svg.main-svg").count() >= 1, figure
        assert page.number(f"document.querySelectorAll('#plot-{figure} .cartesianlayer .subplot').length") == 1, figure
    assert page.names("curves") == ["pruned", "fused", "original 90.0 %"]
    assert page.names("drift") == ["pruned: mean 1.7, 10 % beyond 3", "fused: mean 1"]
    assert page.number("document.querySelector('img.sheet').naturalWidth") == 3 * 8 + 2


def test_a_click_on_a_heading_sorts_and_another_turns_the_order(desktop):
    page = desktop
    column = "#accuracy tbody tr td:nth-child({})"
    gain = page.page.locator("#accuracy th button", has_text="gain")
    before = page.texts(column.format(7))
    gain.click()
    assert page.texts(column.format(7)) == sorted(before, key=float, reverse=True) != before
    assert page.page.locator("#accuracy th[aria-sort=descending]").inner_text().startswith("gain")
    gain.click()
    assert page.texts(column.format(7)) == sorted(before, key=float)
    page.page.locator("#accuracy th button", has_text="group").click()
    assert page.texts(column.format(1)) == ["conv1", "conv1", "conv2", "conv2", "whole network", "whole network"]
    assert page.page.locator("#accuracy th[aria-sort]").count() == 1


def test_a_method_can_be_switched_off_and_on_in_all_figures(desktop):
    page = desktop
    lines = "document.querySelectorAll('#plot-curves .scatterlayer .trace').length"
    assert page.number(lines) == 3
    pruned = page.page.locator("button.toggle", has_text="pruned").first
    pruned.click()
    assert pruned.get_attribute("aria-pressed") == "false"
    assert page.number(lines) == 2
    assert page.names("curves") == ["fused", "original 90.0 %"]
    assert page.names("drift") == ["fused: mean 1"]
    assert page.number("document.querySelectorAll('#plot-training .scatterlayer .trace').length") == 1
    pruned.click()
    assert page.number(lines) == 3


def test_menus_choose_what_is_shown(desktop):
    page = desktop
    title = "document.querySelector('#plot-curves .xtitle').textContent"
    assert page.number(title) == "channels kept (%)"
    page.page.locator("[data-figure=curves] select:visible").last.select_option(label="parameters")
    assert page.number(title) == "parameters"
    read = "JSON.stringify(document.getElementById('plot-curves').data[0].y)"
    assert page.number(read) == "[20,80]"
    page.page.locator("[data-figure=curves] select:visible").first.select_option(label="conv2")
    assert page.number("document.getElementById('plot-curves').data[1].y.map(Math.round)") == [10, 35]
    assert page.number(title) == "parameters"


def luminance(text: str) -> float:
    """Mean of the colour channels of "rgb(r, g, b)"."""
    return sum(float(v) for v in text[text.index("(") + 1 : -1].split(",")[:3]) / 3


def test_light_and_dark_follow_the_reader(desktop):
    ink = "getComputedStyle(document.querySelector('#plot-curves .xtitle')).fill"
    for scheme, dark in (("light", False), ("dark", True), ("light", False)):
        desktop.page.emulate_media(color_scheme=scheme)
        wanted = "rgb(232, 234, 237)" if dark else "rgb(29, 33, 38)"
        desktop.until(f"{ink} === '{wanted}'")
        paper = luminance(desktop.number("getComputedStyle(document.body).backgroundColor"))
        assert abs(luminance(wanted) - paper) > 180
        assert (paper < 80) == dark


def test_it_fits_a_phone(browser, path):
    phone = Opened(browser, path, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    assert phone.number("document.documentElement.scrollWidth") == 360
    rights = phone.page.evaluate(
        "[...document.querySelectorAll('.plot svg')].map(svg => svg.getBoundingClientRect().right)"
    )
    assert rights
    assert max(rights) < 360
    assert phone.said == []
    phone.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_of_a_folder_fits_and_shows_that_its_table_goes_on(browser, folder, width, scheme):
    page = Opened(browser, folder, viewport={"width": width, "height": 740}, color_scheme=scheme)
    assert page.number("document.documentElement.scrollWidth") == width
    paper = luminance(page.number("getComputedStyle(document.body).backgroundColor"))
    assert (paper < 80) == (scheme == "dark")
    more = "document.querySelector('.scroller').dataset.more"
    assert ("right" in page.number(more)) == (width == 360)
    assert "below" in page.number(more)
    assert page.number("getComputedStyle(document.querySelector('.scroller'), '::before').content") == '"⌄"'
    page.page.evaluate("document.querySelector('.scroll').scrollTo(1e4, 1e4)")
    page.until(f"{more} === {'left' if width == 360 else ''!r}")
    reason = page.page.locator("td", has_text="does not follow").bounding_box()
    assert reason is not None
    assert reason["width"] < 500
    assert page.said == []
    page.context.close()


def test_long_names_of_bars_are_told_apart_on_a_phone(browser, folder):
    page = Opened(browser, folder, viewport={"width": 360, "height": 740})
    shown = page.page.evaluate("[...document.querySelectorAll('#plot-sizes .ytick text')].map(t => t.textContent)")
    assert shown[:2] == ["s.0.t.b.a.output_projection", "s.1.t.b.a.output_projection"]
    assert len(set(shown)) == 31
    page.context.close()


def test_a_page_is_small(path, folder):
    assert max(p.stat().st_size for p in (path, folder)) < 1.5e6


def test_print_is_light_narrow_and_complete(desktop):
    width = "document.querySelector('#plot-curves svg').getBoundingClientRect().width"
    desktop.page.emulate_media(media="print", color_scheme="dark")
    desktop.until(f"{width} <= 660")
    assert luminance(desktop.number("getComputedStyle(document.body).backgroundColor")) == 255
    assert not desktop.page.locator(".toggles").is_visible()
    assert desktop.page.pdf(format="A4").startswith(b"%PDF")
    desktop.page.emulate_media(media="screen", color_scheme="light")
    desktop.until(f"{width} > 800")


def test_names_that_look_like_markup_are_shown_as_they_are(browser, records, tmp_path):
    nasty = "<b onclick=alert(1)>net</b>&<script>alert(2)</script>"
    changed = [Record(r.experiment, {**r.setting, "network": nasty}, r.result, r.environment) for r in records]
    write(records_page(changed, sources=[nasty]), tmp_path / "r.html")
    page = Opened(browser, tmp_path / "r.html")
    assert page.texts("h1") == [nasty]
    assert page.said == []
    page.context.close()
