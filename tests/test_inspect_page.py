"""Working with the page: graphs, code, search, keyboard, colours."""

from __future__ import annotations

import re

import pytest
from pages import Browser, made_up
from selenium.webdriver import Keys
from selenium.webdriver.common.by import By

from lowering.inspect import Report, html

# --- the graph ----------------------------------------------------------------------------------------------


def test_clicked_weight_is_found_in_both_graphs_with_its_code(browser: Browser, compiled: list[Report]) -> None:
    browser.open(*compiled)
    browser.click("#table tbody tr", "own.weight")
    assert browser.js("document.querySelector('#graph option:checked').text") == "2 of 2"
    browser.click("#table tbody tr", "up.weight")
    assert browser.js("document.querySelector('#graph option:checked').text") == "1 of 2"
    before, after = browser.linked()
    graph = compiled[0].graphs[0]
    assert before == [line.text for line in graph.lines("before") if "up.weight" in line.weights]
    assert after == [line.text for line in graph.lines("after") if "up.weight" in line.weights]
    assert browser.texts(".line[aria-selected=true]") == [before[-1], after[-1]]
    assert browser.text("#details h2") == "up.weight"
    assert [text for text in browser.texts("#details .call") if "mm(" in text]


def test_clicked_line_selects_its_weight_and_shows_its_code(browser: Browser, compiled: list[Report]) -> None:
    browser.open(*compiled)
    browser.click("figure:nth-child(2) .line", ".dequantized, None)")
    assert browser.js("document.querySelector('#table tr[aria-selected=true] .name').textContent") == "up.weight"
    assert browser.texts("#details .call")
    browser.click("figure:nth-child(2) .line", "= relu(")
    assert "pybinding" in browser.texts("#details pre")[1]
    assert browser.texts("#table tr[aria-selected=true]") == []
    browser.click("#close")
    assert browser.all("#details") == []


def test_line_without_a_kernel_says_why(browser: Browser) -> None:
    report = made_up()
    browser.open(report)
    browser.click("figure:nth-child(2) .line", "return")
    assert browser.text("#details-body p") == "The end of the graph: nothing is computed here."
    browser.click("figure:nth-child(1) .line", "input layers.0.weight_scale")
    assert browser.texts("#details-body p")[0].startswith("The lowering took this line out")
    browser.click("figure:nth-child(2) .line", "quiet_0:")
    assert "fused away, or is only a view" in browser.text("#details-body p")
    del report.graphs[0].stages["post-grad"]
    report.graphs[0].code = []
    browser.open(report)
    browser.click("figure:nth-child(2) .line", "relu_0:")
    assert "came from a cache" in browser.text("#details-body p")


def test_panes_are_aligned_and_signs_mark_what_changed(browser: Browser) -> None:
    browser.open(made_up(2))
    signs = browser.js(
        "[1, 2].map((side) => [...document.querySelectorAll(`figure:nth-child(${side}) .line`)]"
        ".map((line) => [line.dataset.sign ?? '', line.textContent.split(/[:=]/)[0].trim()]))"
    )
    assert len(signs[0]) == len(signs[1])
    assert ["~", "linear_0"] in signs[0]
    assert ["~", "linear_0"] in signs[1]
    assert ["\u2212", "input layers.0.weight"] in signs[0]
    assert ["+", "input layers.0.weight.dequantized"] in signs[1]
    assert [" ", "relu_0"] in signs[0]
    tops = browser.js(
        "[1, 2].map((side) => [...document.querySelectorAll(`figure:nth-child(${side}) .line`)]"
        ".find((line) => line.textContent.startsWith('linear_1')).getBoundingClientRect().top)"
    )
    assert tops[0] == tops[1]


def test_other_stages_and_the_whole_code_can_be_read(browser: Browser) -> None:
    report = made_up()
    browser.open(report)
    stages = browser.js("[...document.getElementById('stage').options].map((each) => each.value)")
    assert stages == ["before and after the lowering", "post-grad", "generated code"]
    for stage, text in (
        ("post-grad", report.graphs[0].post_grad[0]),
        ("generated code", report.graphs[0].code[0].text),
    ):
        browser.driver.find_element(By.CSS_SELECTOR, f"#stage option[value='{stage}']").click()
        lines = browser.js("[...document.querySelectorAll('.pane .line')].map((each) => each.textContent)")
        assert "\n".join(lines) == text
    browser.click("#table tbody tr", "layers.0.weight")
    assert all(browser.linked())


def test_search_counts_walks_and_finds_folded_lines(browser: Browser) -> None:
    browser.open(made_up())
    assert browser.texts(".fold") == ["show 26 unchanged lines"] * 2
    browser.keys("/", "relu_")
    box = browser.driver.switch_to.active_element
    counts = [browser.text("#search-count")]
    for keys in (Keys.ENTER, Keys.ENTER, Keys.SHIFT + Keys.ENTER):
        box.send_keys(keys)
        counts.append(browser.text("#search-count"))
    assert counts == ["1 of 6", "2 of 6", "3 of 6", "2 of 6"]
    assert [text.split(":")[0] for text in browser.texts(".line.current")] == ["relu_1", "relu_1"]
    assert browser.js("CSS.highlights.get('found').size") == 12
    box.send_keys(Keys.CONTROL, "a", Keys.NULL, "quiet_15")
    assert browser.text("#search-count") == "1 of 1"
    assert browser.texts(".fold") == []
    assert browser.texts(".line.current") == ["quiet_15: bf16[1, 64] = quiet(x)"] * 2
    browser.keys("0")
    assert browser.text("#search-count") == "0 of 0"
    browser.keys(Keys.ESCAPE)
    assert browser.js("[document.getElementById('search').value, document.activeElement.tagName]") == ["", "BODY"]
    assert len(browser.names()) == 6


# --- keyboard, colours ---------------------------------------------------------------------------------------


def test_everything_can_be_reached_with_the_keyboard(browser: Browser) -> None:
    browser.open(made_up())
    browser.keys(Keys.TAB)
    assert browser.focused() == "Skip to the weights"
    browser.keys(Keys.ENTER, Keys.TAB)
    assert browser.focused() == "filter"
    browser.keys(*[Keys.TAB] * 3)
    assert browser.focused() == "unmatched 2"
    browser.keys(Keys.SPACE, *[Keys.TAB] * 8)
    assert browser.focused().startswith("layers.0.weight")
    browser.keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert browser.focused().startswith("layers.3.weight")
    assert browser.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.keys(Keys.ENTER)
    assert browser.text("#details h2") == "layers.3.weight"
    assert [len(lines) for lines in browser.linked()] == [3, 2]
    browser.keys(Keys.ENTER)
    assert browser.js("document.activeElement.id") == "details-body"
    browser.keys(Keys.ESCAPE)
    assert browser.all("#details") == []
    assert browser.focused().startswith("layers.3.weight")
    browser.keys(Keys.END)
    assert browser.focused().startswith("layers.4.weight")
    browser.keys("/", Keys.TAB)
    assert browser.focused().startswith("linear_3")  # where the weight was found
    browser.keys(Keys.ARROW_DOWN, Keys.ENTER)
    assert browser.text("#details h2") == "relu_3: bf16[1, 64] = relu(linear_3)"
    assert "relu of layer 3" in browser.texts("#details pre")[1]
    browser.keys(Keys.END, Keys.HOME)
    assert browser.focused() == "input layers.0.weight: f8e4m3fn[64, 64]"


def test_every_control_has_a_name(browser: Browser) -> None:
    browser.open(made_up(), made_up(action="kept"))
    browser.click("#table tbody tr", "layers.0.weight")
    nameless = browser.js(
        "[...document.querySelectorAll('input, select, button, [role=listbox], [role=grid]')].filter((each) =>"
        "!(each.labels?.length || each.ariaLabel || each.textContent.trim())).map((each) => each.outerHTML)"
    )
    assert nameless == []


def test_colours_follow_the_system_until_chosen(browser: Browser) -> None:
    browser.open(made_up())

    def background() -> str:
        return browser.js("getComputedStyle(document.body).backgroundColor")

    browser.media(prefers_color_scheme="light")
    light = background()
    browser.media(prefers_color_scheme="dark")
    dark = background()
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(21, 23, 26)")
    seen = []
    for _ in range(3):
        browser.click("#theme")
        seen.append((browser.text("#theme"), background()))
    assert seen == [("Theme: light", light), ("Theme: dark", dark), ("Theme: system", dark)]


def test_nothing_moves_where_motion_is_not_wanted(browser: Browser) -> None:
    browser.open(made_up())
    duration = "getComputedStyle(document.querySelector('button')).transitionDuration"
    browser.media(prefers_reduced_motion="no-preference")
    assert browser.js(duration) != "0s"
    browser.media(prefers_reduced_motion="reduce")
    assert browser.js(duration) == "0s"


def test_panes_stack_in_narrow_windows(browser: Browser) -> None:
    browser.open(made_up())
    tops = "[...document.querySelectorAll('figure')].map((each) => each.getBoundingClientRect().top)"
    wide = browser.js(tops)
    browser.width(700)
    narrow = browser.js(tops)
    assert wide[0] == wide[1]
    assert narrow[0] < narrow[1]
    assert browser.js("document.documentElement.scrollWidth") <= 700


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(scheme: int) -> None:
    style = (html.FOLDER / "style.css").read_text(encoding="utf-8")
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\);", style)
    colours = {name: (light, dark)[scheme] for name, light, dark in pairs}

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(text: str, back: str) -> float:
        darker, lighter = sorted(luminance(colours[name]) for name in (text, back))
        return (lighter + 0.05) / (darker + 0.05)

    on_plain = ("text", "soft", "folded", "kept", "unmatched", "plain", "focus")
    shown = [(text, back) for text in on_plain for back in ("back", "raised")]
    shown += [("text", back) for back in ("hover", "chosen", "linked", "removed", "added", "changed", "found")]
    shown += [(f"{kind}-sign", kind) for kind in ("removed", "added", "changed")]
    shown += [("soft", back) for back in ("hover", "chosen", "linked")]
    assert {pair: contrast(*pair) for pair in shown if contrast(*pair) < 4.5} == {}
