"""The report in headless Chromium: it draws, sorts, filters, answers to keys, fetches nothing, runs no foreign text."""

from __future__ import annotations

import csv
import math
import os
import re
import shutil
import time
from dataclasses import replace

import pytest

from harness.records import Measurement
from harness.report.__main__ import main
from tests.harness.fake_records import LONG, failed, record, sweep, write_all
from tests.harness.test_report import hostile_records

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LINEARS = [f"model.layers.{block}.self_attn.{part}_proj" for block in range(6) for part in "qkv"]
COMMAND = "python -m harness method=gptq,rtn bits=3,4 method.damping=0.01"


def rich(run, place):
    """With a roofline, contexts, a learning curve and errors of layers."""
    speed = [m for m in run.measurements if m.metric == "time_per_output_token_ms"]
    more = [
        Measurement("decode_roofline_fraction", 0.4, "share", m.on, "higher", None, "128 MiB a step at 40.0 GB/s: …")
        for m in speed
    ]
    more += [Measurement("kv_cache_bytes_per_token", 23040.0, "bytes", "one sequence, float32", "lower")]
    for length in (256, 1024):
        on = f"batch 1, context {length}, 8 new, float32"
        more.append(Measurement("context_output_token_ms", 9 + length / 100, "ms", on, "lower"))
        more.append(Measurement("context_cache_bytes", 23040.0 * length, "bytes", on, "lower"))
    errors = {} if run.card["name"] == "dense" else {name: 0.01 * (1 + k + place) for k, name in enumerate(LINEARS)}
    curve = [[step, math.exp(-step / 30) + place] for step in range(60)]
    return replace(
        run,
        measurements=[*run.measurements, *more],
        layer_errors=errors,
        layer_output_errors=errors,
        curves={"training loss": curve},
        command=COMMAND,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page over two protocols, failures, data types, and names that try to break out; and how large it is."""
    results = tmp_path_factory.mktemp("results")
    pruned = [record("wanda", method={"sparsity": share}, loss=share) for share in (0.3, 0.5)]
    types = [record("nf4", b, loss=1 / b, card={"taxonomy": "quantization/data_types"}) for b in (3, 4, 8)]
    write_all([rich(run, k) for k, run in enumerate(sweep() + pruned + types) if run.status == "finished"], results)
    write_all([failed(record("awq", 3))], results)
    write_all(sweep(on=LONG), results)
    write_all(hostile_records(), results / "hostile")
    assert main([f"paths.results={results}"]) == 0
    return results / "report.html"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium, or set CHROMIUM to its path")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make setup")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, report):
    """Open the page in a window of this size and scheme; at the end it must have been silent and self-contained."""
    complaints, requests, contexts, visited = [], [], [], []

    def visit(width=1300, height=900, scheme="light", file=report):
        visited.append(file.as_uri())
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("body[data-ready]")
        if file == report:
            page.locator("#pareto figure").first.scroll_into_view_if_needed()
            page.wait_for_selector("#pareto .plot[data-drawn]")
        return page

    yield visit
    assert complaints == []
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == visited
    for context in contexts:
        context.close()


def column(page, name, table="#results"):
    """The texts of one column, by its head."""
    heads = page.locator(f"{table} thead th").all_inner_texts()
    place = next(k for k, head in enumerate(heads) if head.strip(" ▲▼").startswith(name))
    return page.locator(f"{table} tbody tr > :nth-child({place + 1})").all_inner_texts()


def numbers(texts):
    return [float(text.split()[0]) for text in texts if text[:1].isdigit()]


def test_every_section_draws_and_the_page_is_small_and_quick(visit, report):
    started = time.perf_counter()
    page = visit()
    assert time.perf_counter() - started < 10  # three seconds on an idle machine
    page.evaluate("dispatchEvent(new Event('beforeprint'))")  # draws what is out of sight
    page.wait_for_function("document.querySelectorAll('.plot:not([data-drawn])').length === 0")
    for section in ("pareto", "degradation", "latency", "layers", "curves", "scaling"):
        assert page.locator(f"#{section} svg g.points_marks path").count() > 2, section
    assert page.locator("#pareto figure").count() == 4  # bits, latency, memory, what compressing cost
    assert page.locator("#latency figure").count() == 2  # batch, context
    assert page.locator("#latency g.lines1_marks path").count() >= 2  # the roofline
    data = page.evaluate("document.getElementById('data').textContent.length")
    assert report.stat().st_size - data < 2e6


def test_sorting_by_a_head_puts_numbers_in_order_and_blanks_last(visit):
    page = visit()
    head = page.get_by_role("button", name="PPL")
    head.click()
    assert page.locator("#results th[aria-sort=ascending]").count() == 1
    rising = column(page, "PPL")
    assert numbers(rising) == sorted(numbers(rising))
    assert len(numbers(rising)) > 5
    head.click()
    falling = column(page, "PPL")
    assert numbers(falling) == sorted(numbers(falling), reverse=True)
    assert not any(text[:1].isdigit() for text in (rising[-1], falling[-1]))  # the failed run


def test_filtering_by_words_family_and_collapse(visit):
    page = visit()
    everything = len(column(page, "Method"))
    page.locator("#results input[type=search]").fill("gptq 4")
    assert all("GPTQ" in name for name in column(page, "Method"))
    page.locator("#results input[type=search]").fill("")
    page.locator("#results").get_by_label("Family").select_option("Unstructured")
    assert [name.strip() for name in column(page, "Method")] == ["Wanda", "Wanda"]
    page.locator("#results").get_by_label("Family").select_option("")
    page.get_by_label("without collapsed and failed runs").first.check()
    assert len(column(page, "Method")) == everything - 3  # RTN at 3 bits, and AWQ at 3 bits, which failed twice
    assert f"{everything - 3} of {everything} rows" in page.locator("#results").inner_text()


@pytest.mark.parametrize("by", ["pointer", "keys"])
def test_a_point_tells_method_settings_and_command(visit, report, by):
    page = visit()
    points = page.locator("#pareto .plot").first.locator("path[tabindex]")
    if by == "pointer":
        points.nth(1).hover(force=True)
    else:
        points.and_(page.locator("[tabindex='0']")).focus()
        page.keyboard.press("ArrowRight")
    told = page.locator("#tip").inner_text()
    assert "Weight only" in told
    assert "grid.group_size=64" in told
    assert COMMAND in told
    if by == "keys":
        page.keyboard.press("Enter")
        made, alone, shown = page.locator("dialog[open] pre").all_inner_texts()[:3]
        assert made == COMMAND
        assert alone.startswith("python -m harness method=gptq ")
        assert re.fullmatch(rf"python -m harness\.show \w+ paths\.results={report.parent}", shown)
        page.keyboard.press("Escape")
        assert page.locator("dialog[open]").count() == 0
        assert page.evaluate("document.activeElement.getAttribute('aria-label')")  # back on the point
        page.keyboard.press("Escape")
        assert page.locator("#tip").is_hidden()


def test_a_legend_hides_a_method(visit):
    page = visit()
    facet = page.locator("#pareto .facets > div").first
    before = facet.locator("g.points_marks path").count()
    facet.get_by_role("button", name="GPTQ", exact=True).click()
    page.wait_for_function(
        "([facet, before]) => facet.querySelectorAll('g.points_marks path').length === before - 2",
        arg=[facet.element_handle(), before],
    )
    assert facet.get_by_role("button", name="GPTQ", exact=True).get_attribute("aria-pressed") == "false"


def test_what_is_shown_can_be_saved(visit):
    """CSV of the rows that pass the filter, in their order; every plot of a figure as an SVG file."""
    page = visit()
    page.locator("#results input[type=search]").fill("gptq")
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save these rows as CSV").first.click()
    lines = list(csv.reader(saved.value.path().read_text(encoding="utf-8").splitlines()))
    assert [line[0] for line in lines[1:]] == [name.strip() for name in column(page, "Method")] == ["GPTQ", "GPTQ"]
    with page.expect_download() as saved:
        page.locator("#pareto figure").first.get_by_role("button", name="Save as SVG").click()
    assert saved.value.path().read_text(encoding="utf-8").startswith("<svg")
    assert saved.value.suggested_filename.endswith(".svg")


def test_choosing_a_comparison_changes_all_that_depends_on_it(visit):
    page = visit()
    assert "gptq-512" in page.locator("#protocol").inner_text()
    assert page.locator("#layers").is_visible()
    other = page.locator("#comparison option", has_text="gptq-1024").get_attribute("value")
    page.get_by_label("Comparison").select_option(other)
    assert "gptq-1024" in page.locator("#protocol").inner_text()
    assert "gptq-512" not in page.locator("#pareto").inner_text()
    assert page.locator("#layers").is_hidden()  # none of these records has errors of layers
    assert len(column(page, "Method")) == len(sweep()) - 1  # nobody knows the protocol of a failed run


def test_text_from_outside_stays_text(visit):
    page = visit()
    place = page.locator("#comparison optgroup[label=hostile] option").first.get_attribute("value")
    page.get_by_label("Comparison").select_option(place)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_function("document.querySelectorAll('.plot:not([data-drawn])').length === 0")
    page.locator("#results tbody button").nth(1).click()
    assert "<img src=x onerror=hacked()>" in page.locator("dialog").inner_text()
    assert "<img src=x onerror=hacked()>" in page.locator("#failed").inner_text()
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.locator("img").count() == 0
    assert "\u202e" not in page.locator("body").inner_text()  # the mark that turns the direction of text


def test_failures_are_listed_with_their_reason(visit):
    listed = visit().locator("#failed").inner_text()
    assert "out of memory: 3.1 GB asked, 2.0 GB free" in listed
    assert "run, compress" in listed


@pytest.mark.parametrize(
    ("records", "sections"),
    [
        ([record("dense")], ["choice", "latency", "table", "failures", "provenance"]),
        ([failed(record("awq", 3))], ["choice", "table", "failures", "provenance"]),
        ([], ["failures"]),
    ],
    ids=["dense alone", "a failure alone", "nothing that can be read"],
)
def test_a_page_of_little_has_only_the_sections_that_say_something(visit, tmp_path, records, sections):
    write_all(records, tmp_path)
    if not records:
        torn = tmp_path / "records" / "model" / "torn.json"
        torn.parent.mkdir(parents=True)
        torn.write_text("{", encoding="utf-8")
    assert main([f"paths.results={tmp_path}"]) == (0 if records else 1)
    page = visit(file=tmp_path / "report.html")
    assert page.evaluate("[...document.querySelectorAll('section:not([hidden])')].map((s) => s.id)") == sections
    assert page.locator("figure:has(.facets:empty)").count() == 0


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1300, "dark")])
def test_a_phone_needs_no_scrolling_sideways_and_the_dark_is_dark(visit, width, scheme):
    page = visit(width, 844, scheme)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_function("document.querySelectorAll('.plot:not([data-drawn])').length === 0")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = page.evaluate("getComputedStyle(document.querySelector('.plot svg text')).fill")
    light, dark = (sum(map(int, colour[4:-1].split(","))) > 384 for colour in (ground, ink))
    assert (light, dark) == ((False, True) if scheme == "dark" else (True, False))


def test_whoever_cannot_see_finds_names_for_everything(visit):
    page = visit()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_function("document.querySelectorAll('.plot:not([data-drawn])').length === 0")
    nameless = """[...document.querySelectorAll('select, input, button')].filter((control) =>
        !control.labels?.length && !control.textContent.trim() && !control.getAttribute('aria-label')).length"""
    assert page.evaluate(nameless) == 0
    assert page.evaluate(
        "[...document.querySelectorAll('.points_marks path')].every((p) => p.getAttribute('aria-label'))"
    )
    assert page.evaluate(
        "[...document.querySelectorAll('figure')].every((f) => f.querySelector('figcaption').textContent)"
    )
    stops = (
        "[...document.querySelectorAll('.plot')].every((p) => p.querySelectorAll('path[tabindex=\"0\"]').length === 1)"
    )
    assert page.evaluate(stops)  # one stop of the Tab key for each plot
    page.locator("#pareto figure details summary").first.click()
    rows = page.locator("#pareto figure").first.locator("table tbody tr")
    rows.nth(5).wait_for(state="attached")  # the plot as a table, made when it is first opened
