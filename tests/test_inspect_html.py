"""The report as a page, looked at in a browser, and as a fragment for notebooks."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from pages import HOSTILE, Browser, made_up, release
from selenium.webdriver import Keys
from selenium.webdriver.common.by import By

from lowering.inspect import Report, html
from lowering.report import GraphBreak
from lowering.weights import PlainLinear

# --- loading ------------------------------------------------------------------------------------------------


def test_page_loads_nothing_from_elsewhere(browser: Browser, compiled: list[Report]) -> None:
    browser.open(*compiled)
    messages = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    requests = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    assert [url for url in requests if url != "data:,"] == [(browser.folder / "report.html").as_uri()]
    assert browser.js("performance.getEntriesByType('resource').length") == 0
    policy = browser.js("document.querySelector('meta[http-equiv]').content")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def test_summary_says_what_became_of_the_weights(browser: Browser, compiled: list[Report]) -> None:
    browser.open(*compiled)
    report = compiled[0]
    assert browser.text("h1") == "Sample"
    assert f"torch {torch.__version__}" in browser.text(".versions")
    assert browser.texts(".count") == ["1 folded", "0 kept", "1 unmatched", "1 not MXFP8"]
    settings = browser.texts(".settings > div")
    assert {"dequant_at_load on", "freezing no", "dynamic not set", "caches no"} <= set(settings)
    passes = f"passes {report.pass_seconds:.3f} s of {report.compile_seconds:.2f} s"
    assert browser.text(".times").startswith(passes)
    (note,) = browser.texts(".notes li")
    broken = report.graphs[0].graph_break
    assert broken is not None
    for part in ("after graph 1", broken.reason, broken.explanation, broken.where):
        assert part in note


def test_notes_and_breaks_of_no_graph_are_shown(browser: Browser) -> None:
    report = Report(
        "Nothing", {"dequant_at_load": "on"}, breaks=[GraphBreak("a reason", "explained", "model.py:3 in f")]
    )
    browser.open(report)
    note, broken = browser.texts(".notes li")
    assert note == 'Note nothing was compiled through backend="mxfp8", enable() or options()'
    assert broken == "Graph break model.py:3 in f a reason explained"
    assert browser.text("#panes") == "No graph was compiled in this run."
    assert browser.text("tr.totals th") == "0 weights"


@pytest.mark.parametrize("released", [False, True], ids=["held", "released"])
def test_bars_share_one_scale_and_say_their_numbers(browser: Browser, released: bool) -> None:
    report = release(made_up()) if released else made_up()
    browser.open(report)
    memory, plain = report.memory, 8192
    copies = sum(weight.bytes_dequantized for weight in report.weights)
    expected = [memory.before + plain, memory.peak + plain, memory.after + plain]
    assert browser.texts(".bar-total") == [html.size(total) for total in expected]
    widths = browser.js(
        "[...document.querySelectorAll('.bar')].map((bar) =>"
        "[...bar.children].map((each) => parseFloat(each.style.width)))"
    )
    assert [sum(each) for each in widths] == pytest.approx(
        [100 * total / max(expected) for total in expected], abs=0.01
    )
    after = f"MXFP8 weights and scales {html.size(memory.after - copies)}, dequantized copies {html.size(copies)}"
    (label,) = browser.js("[...document.querySelectorAll('.bar')].map((bar) => bar.ariaLabel).slice(2)")
    assert label == f"Memory after: {html.size(expected[2])}; {after}, linears that are not MXFP8 8.0 KiB"


def test_sizes_read_alike_in_python_and_in_the_page(browser: Browser) -> None:
    counts = [0, 1023, 1024, 16640, 16 * 1024**2 + 1024**2 // 4, 3 * 1024**3 + 1024**3 // 8, 5 * 1024**4]
    browser.open(made_up())
    assert browser.js("arguments[0].map(size)", counts) == [html.size(count) for count in counts]
    assert html.size(16640) == "16.3 KiB"


# --- the table ----------------------------------------------------------------------------------------------


def test_columns_sort_by_value_and_again_in_reverse(browser: Browser) -> None:
    browser.open(made_up(12))
    in_order = [f"layers.{position}.weight" for position in range(12)]
    for column in ("name", "shape", "bytes before"):
        browser.click("#table th button", column)
        assert browser.names() == in_order, column
        assert browser.js(
            "[...document.querySelectorAll('th[aria-sort=ascending]')].map((each) => each.innerText)"
        ) == [column]
        browser.click("#table th button", column)
        assert browser.names() == in_order[::-1], column
    browser.click("#table th button", "action")
    assert browser.texts("#table .chip") == ["folded"] * 8 + ["unmatched"] * 4


def test_filters_by_text_and_action_and_totals_follow(browser: Browser) -> None:
    report = made_up(12)
    browser.open(report)
    assert browser.texts(".toggle") == ["folded 8", "kept 0", "unmatched 4"]

    def totals(*positions: int) -> list[str]:
        shown = [report.weights[position] for position in positions]
        count = "12 weights" if len(shown) == 12 else f"{len(shown)} of 12 weights"
        sizes = (sum(each.bytes_before for each in shown), sum(each.bytes_after for each in shown))
        return [count, *map(html.size, sizes)]

    assert browser.texts(".totals > *") == totals(*range(12))
    browser.driver.find_element(By.ID, "filter").send_keys("LAYERS.1")
    assert browser.names() == ["layers.1.weight", "layers.10.weight", "layers.11.weight"]
    assert browser.texts(".totals > *") == totals(1, 10, 11)
    browser.click(".toggle", "folded")
    assert browser.names() == ["layers.11.weight"]
    assert browser.texts(".totals > *") == totals(11)
    browser.click(".toggle", "folded")
    browser.click(".toggle", "unmatched")
    assert browser.texts(".totals > *") == totals(1, 10)


def test_plain_linears_are_listed_below_when_asked_for(browser: Browser) -> None:
    browser.open(made_up())
    assert browser.texts(".plain-linears td") == []
    browser.click(".plain-linears summary", "1 linear on weights that are not MXFP8")
    assert browser.texts(".plain-linears td") == ["head.weight", "64x64", "bfloat16", "8.0 KiB"]


# --- runs, keyboard, colours --------------------------------------------------------------------------------


def test_tabs_switch_between_runs_and_a_table_compares_them(browser: Browser, compiled: list[Report]) -> None:
    browser.open(*compiled)
    browser.click("[role=tab]", "flag off")
    assert browser.texts(".count")[:3] == ["0 folded", "1 kept", "1 unmatched"]
    assert browser.texts("#table .chip") == ["kept", "unmatched"]
    browser.keys(Keys.ARROW_RIGHT)
    assert browser.focused() == browser.text("[role=tab][aria-selected=true]") == "flag on"
    assert browser.texts(".count")[:3] == ["1 folded", "0 kept", "1 unmatched"]
    assert browser.js("document.getElementById('panel').getAttribute('aria-labelledby')") == "tab-0"
    up = [each.weights[0] for each in compiled]
    expected = ["up.weight", "folded", html.size(up[0].bytes_after), "kept", html.size(up[1].bytes_after)]
    assert browser.texts("#comparison tbody tr:first-child > *") == expected
    browser.click("#only-different")
    assert browser.texts("#comparison tbody th") == ["up.weight"]


def test_one_run_has_no_tabs_and_nothing_to_compare(browser: Browser) -> None:
    browser.open(made_up())
    assert browser.driver.find_elements(By.CSS_SELECTOR, "[role=tab], #comparison") == []


# --- what comes from the model ------------------------------------------------------------------------------


def test_hostile_names_are_only_text(browser: Browser) -> None:
    report = dataclasses.replace(made_up(names=[HOSTILE, "plain", "other"]), title=HOSTILE)
    report.graphs[0].plain = [PlainLinear(HOSTILE, (1, 1), HOSTILE, 1)]
    report.breaks = [GraphBreak(HOSTILE, HOSTILE, HOSTILE)]
    browser.open(report, report)
    browser.click("#table tbody tr", "evil")
    assert browser.driver.find_elements(By.ID, "evil") == []
    assert browser.names()[0] == browser.text("h1") == browser.text("#details h2") == HOSTILE
    assert browser.linked()[0][0] == f"input {HOSTILE}: f8e4m3fn[64, 64]"
    assert browser.texts("#comparison tbody th")[0] == HOSTILE


def test_fragment_has_no_script_and_escapes_names() -> None:
    report = dataclasses.replace(made_up(names=[HOSTILE, "plain", "other"]), breaks=[GraphBreak(HOSTILE)])
    text = report._repr_html_()
    assert text == html.fragment(report)
    assert not re.search(r"<script|<style|<link|<b |class=| on\w+=|url\(", text)
    assert text.count("&lt;/script&gt;&lt;b id=&#34;evil&#34;&gt;x&#34;&#39;&amp;amp;") == 2
    for shown in ("2 folded", "0 kept", "1 unmatched", "1 not MXFP8", "64x64", html.size(report.memory.after)):
        assert shown in text


def test_same_reports_give_the_same_page_but_for_times() -> None:
    one, other = made_up(), made_up()
    other.graphs[0].seconds["total"] = 7.0
    pages = [html.page([each, made_up(action="kept")]) for each in (one, other)]
    assert pages[0] != pages[1]
    without = [re.sub(r'<p class="times">.*?</p>', "", page) for page in pages]
    assert without[0] == without[1]


# --- many weights -------------------------------------------------------------------------------------------


def test_five_hundred_weights_load_filter_and_select(browser: Browser) -> None:
    browser.open(made_up(500), made_up(500, action="kept"))
    assert len(browser.names()) == 500
    elements = browser.js("document.querySelectorAll('*').length")
    assert elements < 20_000
    browser.driver.find_element(By.ID, "filter").send_keys("layers.49")
    assert len(browser.names()) == 11
    assert browser.text(".totals th") == "11 of 500 weights"
    browser.click("#table tbody tr", "layers.499.weight")
    before, after = browser.linked()
    assert (len(before), len(after)) == (3, 2)
    in_sight = browser.js(
        "[...document.querySelectorAll('.line[aria-selected=true]')].map((line) => {"
        "const pane = line.closest('.pane').getBoundingClientRect(), own = line.getBoundingClientRect();"
        "return own.top >= pane.top && own.bottom <= pane.bottom && own.bottom <= innerHeight; })"
    )
    assert in_sight == [True, True]
    for run in ("flag off", "flag on"):
        browser.click("[role=tab]", run)
    assert browser.js("document.querySelectorAll('*').length") <= elements + 10
