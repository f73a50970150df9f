"""The page as text: it has what its records allow, escapes everything and asks nobody for anything."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from lab.report.samples import ENVIRONMENT, original, reduction
from PIL import Image

from intrafusion.lab.report import html
from intrafusion.lab.report.html import Page, plan_page, records_page, render, script_json, write
from intrafusion.lab.report.sheet import contact_sheet, data_address
from intrafusion.measure.closeness import Closeness
from intrafusion.measure.comparison import Comparison, Footprint, HeldOut
from intrafusion.measure.size import Size
from intrafusion.plan import Decision, Plan
from intrafusion.recipe import Recipe

NASTY = "<script>alert(1)</script>&\"'</title><img src=x onerror=alert(2)>"


@pytest.fixture(autouse=True)
def no_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page without the library that draws the figures."""
    monkeypatch.setattr(html, "_packed_plotly", lambda: "")


class Parsed(HTMLParser):
    """Tags with their attributes, and the text of each element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "i"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())


def test_tiles_say_how_many_test_images_each_network_had():
    records = [original(), *(reduction("conv1", 0.5, "select", 0.4, network=f"net{n}", images=n) for n in (100, 2500))]
    assert ("100 to 2,500", "test images") in html.tiles_of(records)
    assert ("100", "test images") in html.tiles_of(records[:2])


def test_every_section_that_the_records_allow_is_there_and_linked(records):
    page = Parsed(render(records_page(records, sources=["r.jsonl"], version="9.8.7")))
    names = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert names == [
        *("curves", "accuracy", "gains", "sizes", "marginals", "training", "drift", "landscape", "reproduce")
    ]
    assert [a["href"] for tag, a in page.tags if tag == "a"] == [f"#{name}" for name in names]
    assert "intrafusion experiment data-free -o r.jsonl" in page.texts["pre"]
    assert "keep: 0.9\nreducer: select" in page.texts["pre"]
    assert {"r.jsonl", "torch 2.9, numpy 2.0", "x86_64, 2 cores, 1 threads, cpu"} <= set(page.texts["dd"])
    assert page.texts["title"] == page.texts["h1"] == ["net, other, third"]
    assert any("9.8.7" in text for text in page.texts["p"])


def test_the_lead_and_the_tiles_are_the_largest_gain_of_whole_networks(records):
    page = records_page(records)
    assert page.lead == (
        "With 50 % of the channels of the whole network kept (25 % of the parameters), net has 60.0 % accuracy when "
        "fused and 20.0 % when pruned. The original has 90.0 %."
    )
    assert ("+40.0 points", "largest gain of fusing over pruning (whole network, keep 50 %)") in page.tiles
    assert ("90.0 %", "original accuracy") in page.tiles


def test_records_of_one_kind_make_a_page_without_the_other_sections():
    page = records_page([original(), reduction("conv1", 0.5, "mine", 0.5)])
    assert [s.name for s in page.sections] == ["accuracy", "reproduce"]
    assert page.lead == "2 measurements."
    assert "plotly" not in render(page).split("<script>")[1].lower().split("const page")[0]


def test_no_records_are_refused():
    with pytest.raises(ValueError, match="expected records, got none"):
        records_page([])


def test_everything_is_escaped():
    setting = {"network": NASTY, "criterion": NASTY, "experiment": NASTY}
    records = [reduction(NASTY, keep, NASTY, 0.5, **setting) for keep in (0.5, 0.9)]
    records = [type(r)(r.experiment, r.setting, {**r.result, "recipe": NASTY}, r.environment) for r in records]
    records += [type(records[0])(NASTY, r.setting, r.result, {**ENVIRONMENT, "command": NASTY}) for r in records]
    text = render(records_page(records, sources=[NASTY], version=NASTY))
    page = Parsed(text)
    assert NASTY not in text
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert page.texts["h1"] == [NASTY]
    assert NASTY in page.texts["td"]
    data = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.DOTALL).group(1))
    curve = data["figures"][0]["variants"]["0,0,0,0"]["data"][0]
    assert "<" not in curve["name"]  # Plotly reads names as markup
    assert "&lt;script&gt;" in curve["name"]


def test_what_is_not_a_number_becomes_null():
    assert json.loads(script_json({"a": [float("nan"), float("inf"), 1.5]})) == {"a": [None, None, 1.5]}
    assert script_json("</script><!--") == '"\\u003c/script\\u003e\\u003c!--"'


def test_the_page_refers_to_nothing_outside(records):
    page = Parsed(render(records_page(records)))
    addresses = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "action", "data")]
    assert all(address.startswith("#") for address in addresses)
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_the_page_of_a_saved_folder_shows_its_plan():
    decisions = (
        Decision("conv1", 16, 8, ("conv1.weight[0] produces",), "mixed", None, 0, 1),
        Decision("fc", 10, 10, ("fc.weight[0] produces",), "mixed", "it is the <output>", 1, None),
    )
    plan = Plan(Recipe.of(keep=0.5), decisions, {}, warnings=("a & b",))
    page = plan_page(plan, Size(1000, 8000), Size(250, 2000), folder="some/small", version="1")
    text = Parsed(render(page))
    rows = [text.texts["td"][i : i + 6] for i in (0, 6)]
    assert rows[0] == ["conv1", "16", "8", "50 %", "mixed", "conv1"]
    assert text.texts["td"][6:] == ["fc", "10", "10", "100 %", "kept", "it is the <output>"]
    assert ("25.0 %", "of the parameters: 1,000 → 250") in page.tiles
    assert plan.recipe.to_yaml().strip() in text.texts["pre"]
    assert any("intrafusion.load('some/small'" in block for block in text.texts["pre"])
    assert text.texts["li"] == ["a & b"]


def test_the_page_of_a_saved_folder_says_how_fast_and_how_close_it_is():
    held_out = HeldOut("51 images", True, Closeness(0.14, 0.94), Closeness(0.71, 0.6))
    takes = Footprint(1000, 8000, 4000, 20.0), Footprint(250, 2000, 1000, 8.0)
    compared = Comparison(*takes, batch=1, threads=2, device="cpu", runs=17, held_out=held_out)
    page = plan_page(Plan(Recipe.of(keep=0.5), (), {}), None, None, folder="small", comparison=compared)
    assert ("2.50 ×", "as fast as the original, on the machine it was made on") in page.tiles
    assert ("14.0 %", "of their variance is how far outputs differ (51 images, unseen by the solver)") in page.tiles
    told = Parsed(render(page)).texts["dd"]
    assert any("20 ms -> 8 ms" in text and "2 threads" in text for text in told), told
    assert any("on 51 unseen images differ by 14 % of their variance" in text for text in told)


def test_a_page_without_figures_holds_no_plotting_library_and_needs_none(monkeypatch):
    monkeypatch.setattr(html, "_packed_plotly", lambda: pytest.fail("asked for plotly"))
    assert "<h1>empty</h1>" in render(Page("empty", "", "", (), ()))


def test_it_is_written_whole_or_not_at_all(records, tmp_path, monkeypatch):
    path = tmp_path / "made" / "report.html"
    write(records_page(records), path)
    assert path.read_text().endswith("</html>\n")
    path.write_text("old")

    def missing():
        raise OSError("cannot be read")

    monkeypatch.setattr(html, "_packed_plotly", missing)
    with pytest.raises(OSError, match="cannot be read"):
        write(records_page(records), path)
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_contact_sheet_places_images_and_stretches_each():
    images = torch.stack([torch.full((1, 2, 3), -5.0), torch.full((1, 2, 3), 3.0), torch.zeros(1, 2, 3)])
    images[:, 0, 1, 2] += torch.tensor([1.0, 2.0, 4.0])
    sheet = contact_sheet(images)
    assert sheet.shape == (5, 7, 3)  # two by two, a pixel between
    for y, x in ((0, 0), (0, 4), (3, 0)):
        part = sheet[y : y + 2, x : x + 3]
        assert part[1, 2].tolist() == [255] * 3
        assert int(part.sum()) == 3 * 255
    assert sheet[3:, 4:].unique().tolist() == [255]
    assert contact_sheet(torch.rand(100, 3, 4, 4), shown=4).shape == (9, 9, 3)
    with pytest.raises(ValueError, match=r"expected \(n, 1 or 3, height, width\), got \[2, 5, 4, 4\]"):
        contact_sheet(torch.rand(2, 5, 4, 4))


def test_a_picture_as_an_address_is_that_picture():
    sheet = contact_sheet(torch.rand(4, 3, 5, 5))
    kind, _, data = data_address(sheet).partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        found = torch.from_numpy(np.array(image))
    assert torch.equal(found, sheet)
