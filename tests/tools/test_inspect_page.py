"""The page opens from disk in a browser, unfolds, matches nodes across panes, searches and sorts, without an error."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from models import Stack, wan
from tahf4_compiler.tools.inspection.report import Report
from tahf4_compiler.tools.inspection.statistics import Evidence

import tahf4_compiler as tahf4

sys.path.insert(0, str(Path(__file__).parents[1] / "plugin"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


def opened(browser, path):
    """Return a page, and the list that its errors go to."""
    page, errors = browser.new_page(viewport={"width": 1400, "height": 900}), []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda r: errors.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
    page.set_default_timeout(10_000)
    page.goto(path.as_uri())
    return page, errors


@pytest.fixture(scope="module")
def page_of_wan(tmp_path_factory):
    """A page with a recipe, its calibration and measured times."""
    folder = tmp_path_factory.mktemp("page")
    model, inputs = wan(num_layers=3)
    checkpoint = folder / "calibration"
    with tahf4.calibrate(model, step_groups=2, checkpoint=checkpoint, options={"inductor": False}) as calibration:
        for group in range(2):
            with calibration.at(step_group=group), torch.no_grad():
                model(**inputs)
    recipe = calibration.recipe(mask="percentile", high_precision_steps=(-1,))
    tahf4.apply_recipe(model, dataclasses.replace(recipe, high_precision_steps=()))
    lowered = tahf4.lower(tahf4.capture(model, (), inputs), options={"fuse.always": True})
    report = Report.of(lowered, Evidence.of(recipe, checkpoint))
    times = {node.name: 0.5 for node in lowered.snapshots[-1].nodes if node.op == "call_function"}
    Report(**{**report.__dict__, "milliseconds": times, "device": "test", "compiled": 12.5}).write_html(
        folder / "page.html"
    )
    return folder / "page.html"


def test_a_page_holds_everything_and_asks_for_nothing(page_of_wan):
    text = page_of_wan.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert "@import" not in text
    assert "{{" not in text.partition('id="data">')[0]
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))
    assert len(data["linears"]) == 36
    assert len(data["evidence"]["activations"]) == 21
    assert data["evidence"]["activations"]["blocks.0.attn1.to_q"]["members"] == [
        f"blocks.0.attn1.to_{x}" for x in "qkv"
    ]


@needs_browser
def test_the_page_opens_unfolds_and_matches_nodes(browser, page_of_wan):
    page, errors = opened(browser, page_of_wan)
    first, second = page.locator(".pane").all()
    group = first.locator(".row.group", has_text="blocks.0 … 2")
    assert "3 alike" in group.inner_text()
    assert first.locator(".row").count() < 40
    group.click()
    block = first.locator('.row[data-path="blocks.1"]')
    block.focus()
    page.keyboard.press("ArrowRight")
    assert block.get_attribute("aria-expanded") == "true"
    first.locator('.row[data-path="blocks.1.ffn"]').click()
    first.locator('.row[data-path="blocks.1.ffn.net"]').click()
    first.locator('.row[data-path="blocks.1.ffn.net.2"]').click()
    linear = first.locator('.row[data-path="blocks.1.ffn.net.2"] + div .row').first
    linear.click()
    details = page.locator("#details").inner_text()
    assert "blocks.1.ffn.net.2" in details
    assert "aten.linear" in details
    match = second.locator(".row.match", has_text="linear")
    match.first.wait_for()
    match.first.click()
    details = page.locator("#details").inner_text()
    assert "HiF4 W4A4" in details
    assert "percentile" in details
    assert "0.5 ms" in details
    assert first.locator(".row.match").count() >= 1
    assert errors == []


@needs_browser
def test_the_page_searches_sorts_and_draws(browser, page_of_wan):
    page, errors = opened(browser, page_of_wan)
    page.keyboard.press("/")
    page.keyboard.type("blocks.2 to_k")
    assert page.locator("#hits [role=option]").count() > 2
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator(".row.chosen").count() == 1
    page.fill("#search", "no such thing")
    assert "nothing found" in page.locator("#hits").inner_text()
    page.keyboard.press("Escape")
    page.click("#tab-linears")
    assert page.locator("#linears tbody tr").count() == 36
    header = page.locator("#linears th", has_text="bytes").first
    header.locator("button").click()
    header = page.locator('#linears th[aria-sort="ascending"]')
    assert header.count() == 1
    page.fill("#filter", "blocks.1 hif4")
    assert page.locator("#linears tbody tr").count() == 10
    page.locator("#linears tbody tr").first.press("Enter")
    assert page.locator("#view-graph").is_visible()
    page.click("#tab-plots")
    assert page.locator("#plots .plot").count() == 8
    assert page.locator("#plots rect").count() > 20
    assert page.locator("#plots .plot", has_text="Not measured").count() == 0
    along = page.locator("#plots .plot", has_text="Error along steps")
    assert along.locator("circle").count() == 2 * 10, "two parts, ten kinds of linears"
    assert "blocks.*.ffn.net.2" in along.inner_text()
    output = page.locator("#plots .plot", has_text="Error of the output along steps")
    titles = output.locator("title").all_text_contents()
    assert ["it runs in high precision" in title for title in titles] == [False, True], titles
    assert output.locator('circle[fill="none"]').count() == 1
    assert "runs the steps -1 (negative ones from the end) in high precision" in output.inner_text()
    time = page.locator("#plots .plot", has_text="Time by operator").inner_text()
    assert "run one by one, not compiled" in time
    assert "which takes 12.50 ms as a whole" in time
    tiles = page.locator("#tiles").inner_text()
    assert "not compiled (test)" in tiles
    assert "a whole call, compiled (test)" in tiles
    page.click("#tab-passes")
    assert "quantize" in page.locator("#passes").inner_text()
    assert "Denoising steps in high precision: -1" in page.locator("#passes").inner_text()
    assert errors == []


def parts_of(page, row):
    """Return the parts of a row in the plot of memory and FLOPs, by name: value as text, width and colour."""
    found = page.locator("#plots .plot", has_text="Memory and FLOPs by precision").locator("svg rect").all()
    height = 46 * row + 18
    bars = [bar for bar in found if float(bar.get_attribute("y")) == height]
    titles = [bar.locator("title").text_content() for bar in bars]
    return {
        title.partition(":")[0]: (
            title.partition(": ")[2],
            float(bar.get_attribute("width")),
            bar.get_attribute("fill"),
        )
        for bar, title in zip(bars, titles, strict=True)
    }


@needs_browser
@pytest.mark.parametrize(
    "name", ["nvfp4", "HiF4, nvfp4, mxfp8", *(pytest.param(it, marks=pytest.mark.slow) for it in ("HiF4", "none"))]
)
def test_memory_and_flops_have_a_part_for_each_format(browser, tmp_path, name):
    from tahf4_nvfp4.quantize import Nvfp4Quantize

    options = {"HiF4": {}, "nvfp4": {"passes": [Nvfp4Quantize()]}, "none": {"disable_passes": ["quantize"]}}
    lowered = tahf4.lower(tahf4.capture(Stack().eval(), (torch.randn(4, 64),)), options=options.get(name, {}))
    report = Report.of(lowered, Evidence())
    four = [entry for entry in report.plan if entry["decision"] != "high_precision"]
    if "," in name:  # as plug-ins would say that take some linears each
        for entry, decision in zip(four, ["hif4", "nvfp4", "mxfp8"] * 2, strict=True):
            entry["decision"] = decision
    report.write_html(tmp_path / "page.html")
    page, errors = opened(browser, tmp_path / "page.html")
    page.click("#tab-plots")
    formats = ["HiF4"] if name == "none" else name.split(", ")
    for row, key, others in ((1, "bytes_after", ["high precision"]), (2, "flops", ["linears high", "attention"])):
        parts = parts_of(page, row)
        assert list(parts) == [*formats, *others]
        for form in formats:
            size = sum(entry[key] for entry in four if entry["decision"] == form.replace("HiF4", "hif4"))
            text, width, _ = parts[form]
            assert (width > 0) == (size > 0)
            if key == "flops":
                assert text.startswith(page.evaluate("(value) => short(value)", size))
            else:
                assert text.startswith(page.evaluate("(value) => bytes(value)", size))
        assert len({colour for _, _, colour in parts.values()}) == len(parts)
    legend = page.locator("#plots .plot", has_text="Memory and FLOPs by precision").locator(".legend").inner_text()
    assert all(form in legend for form in formats)
    assert errors == []


@needs_browser
def test_what_was_not_measured_is_said(browser, tmp_path):
    lowered = tahf4.lower(tahf4.capture(Stack(2).eval(), (torch.randn(4, 64),)))
    Report.of(lowered, Evidence()).write_html(tmp_path / "page.html")
    page, errors = opened(browser, tmp_path / "page.html")
    page.click("#tab-plots")
    for name in ("Error along depth", "Error along steps", "Error of the output", "Activation distribution"):
        assert "Not measured" in page.locator("#plots .plot", has_text=name).inner_text()
    assert errors == []


@needs_browser
def test_figures_that_are_no_numbers_are_shown(browser, tmp_path):
    model = Stack(2).eval()
    model.blocks[1].up.weight.data[0, 0] = float("nan")
    lowered = tahf4.lower(tahf4.capture(model, (torch.randn(4, 64),)), options={"verify": True})
    lowered.report(tmp_path / "page.html")
    page, errors = opened(browser, tmp_path / "page.html")
    page.click("#tab-passes")
    assert "nan" in page.locator("#passes tr", has_text="quantize").first.inner_text()
    assert errors == []


@needs_browser
def test_names_cannot_break_out_of_the_page(browser, tmp_path):
    lowered = tahf4.lower(tahf4.capture(Stack(2).eval(), (torch.randn(4, 64),)))
    name = "</script><script>window.broken = 1</script><!--"
    report = Report.of(lowered, Evidence(), title=name, source=f"<img src=x onerror=alert(1)> & {name}")
    for entry in report.plan:
        entry["reason"] = name
    report.write_html(tmp_path / "page.html")
    page, errors = opened(browser, tmp_path / "page.html")
    assert page.locator("#title").inner_text() == name
    page.click("#tab-linears")
    assert name in page.locator("#linears tbody tr").first.inner_text()
    assert page.evaluate("window.broken") is None
    assert page.locator("img").count() == 0
    assert errors == []
