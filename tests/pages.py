"""Reports to look at and a browser to look with."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import layer
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from torch import Tensor, nn

from lowering.inspect import Report, html
from lowering.report import GeneratedCode, GraphReport
from lowering.text import Line
from lowering.weights import PlainLinear, WeightReport

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
FLAGS += ("--disable-component-update", "--disable-sync")
HOSTILE = """</script><b id="evil">x"'&amp;<!--{{ 7 * 7 }}"""


# --- reports ------------------------------------------------------------------------------------------------


def made_up(count: int = 6, action: str = "folded", names: Sequence[str] = ()) -> Report:
    """A report on ``count`` layers as ``explain`` makes it, without compiling: every third weight is unmatched,
    and the last layers are followed by many lines that nothing happens to.
    """
    names = names or [f"layers.{position}.weight" for position in range(count)]
    graph = GraphReport(seconds={"passes": 0.005, "total": 1.43})
    declared: dict[str, list[Line]] = {"before": [], "after": []}
    computed: dict[str, list[Line]] = {"before": [], "after": []}
    code, calls, handles = [], [], {}
    x = Line("input x: bf16[1, 64]", "x")
    for k, name in enumerate(names):
        done = "unmatched" if k % 3 == 2 else action
        copies = 2 * 64 * 64 * (k + 1) if done == "folded" else 0
        packed = 33 * 2 * 64 * (k + 1)
        row = WeightReport(name, (64 * (k + 1), 64), done, f"because {done}", packed, packed + copies, "mm", copies)
        graph.weights.append(row)
        inputs = [Line(f"input {name}: f8e4m3fn[64, 64]", f"w{k}", (name,))]
        inputs += [Line(f"input {name}_scale: u8[64, 2]", f"s{k}", (name,))]
        operator = Line(f"linear_{k}: bf16[1, 64] = mxfp8.linear(x, {name})", f"op_{k}", (name,), True, "mxfp8.linear")
        folded = Line(
            f"linear_{k}: bf16[1, 64] = linear(x, {name}.dequantized)", f"linear_{k}", (name,), True, "linear"
        )
        relu = Line(f"relu_{k}: bf16[1, 64] = relu(linear_{k})", f"relu_{k}", target="relu")
        declared["before"] += inputs
        declared["after"] += [Line(f"input {name}.dequantized: bf16[64, 64]", f"d{k}", (name,))] if copies else inputs
        computed["before"] += [operator, relu]
        computed["after"] += [folded if copies else operator, relu]
        code.append(f"fused_relu_{k} = async_compile.cpp_pybinding(['float*'], r'''\nrelu of layer {k};\n''')")
        calls += [f"# [Provenance debug handles] extern_kernels.mm:{2 * k}", f"extern_kernels.mm(x, buf{k})"]
        calls += [f"# [Provenance debug handles] fused_relu_{k}:{2 * k + 1}", f"fused_relu_{k}(buf{k})"]
        handles[f"extern_kernels.mm:{2 * k}"] = (computed["after"][-2].node,)
        handles[f"fused_relu_{k}:{2 * k + 1}"] = (relu.node,)
    quiet = [Line(f"quiet_{k}: bf16[1, 64] = quiet(x)", f"quiet_{k}", target="quiet") for k in range(30)]
    for stage in declared:
        graph.stages[stage] = [[*declared[stage], x, *computed[stage], *quiet, Line("return (quiet_29,)")]]
    graph.stages["post-grad"] = [[dataclasses.replace(line, sources=(line.node,)) for line in graph.stages["after"][0]]]
    graph.code = [GeneratedCode("\n".join([*code, *calls]), handles)]
    graph.plain = [PlainLinear("head.weight", (64, 64), "bfloat16", 8192)]
    settings = {"dequant_at_load": "on" if action == "folded" else "off", "freezing": False, "dynamic": None}
    return Report("Made up", settings, [graph], seconds=2.5)


def release(report: Report) -> Report:
    """The same with the packed bytes of folded weights given back."""
    graph = report.graphs[0]
    weights = [
        dataclasses.replace(each, bytes_after=each.bytes_dequantized or each.bytes_before) for each in graph.weights
    ]
    return dataclasses.replace(report, graphs=[dataclasses.replace(graph, weights=weights)])


class Sample(nn.Module):
    """A packed and a plain linear, a graph break, and a weight that is decoded by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.up = layer(64, 64, bias=False)
        self.plain = nn.Linear(64, 64, dtype=torch.bfloat16)
        self.own = layer(64, 64, seed=7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        torch._dynamo.graph_break()
        exponent = self.own.weight_scale.float() - 127
        own = (self.own.weight.float().unflatten(-1, (-1, 32)) * torch.exp2(exponent)[..., None]).flatten(-2)
        return nn.functional.linear(self.plain(hidden).relu(), own.bfloat16())


# --- the browser --------------------------------------------------------------------------------------------


def program(*names: str) -> str:
    for name in names:
        if path := shutil.which(name):
            return path
    message = f"none of {', '.join(names)} is installed, which these tests drive"
    if "CI" in os.environ:
        pytest.fail(message)
    pytest.skip(message)


def start(profile: Path) -> Any:
    """A headless browser with an empty profile."""
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium", "chromium-browser", "google-chrome")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(program("chromedriver")))


class Browser:
    """A page of reports, and what a person does with it."""

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver, self.folder = driver, folder

    def open(self, *reports: Report) -> Browser:
        path = self.folder / "report.html"
        path.write_text(html.page(reports), encoding="utf-8")
        self.driver.get_log("performance")
        self.driver.get(path.as_uri())
        return self

    def js(self, expression: str, *arguments: object) -> Any:
        return self.driver.execute_script(f"return {expression}", *arguments)

    def all(self, css: str) -> list[Any]:
        """Elements that can be seen, or scrolled to."""
        return [each for each in self.driver.find_elements(By.CSS_SELECTOR, css) if each.is_displayed()]

    def texts(self, css: str) -> list[str]:
        return self.js(
            "[...document.querySelectorAll(arguments[0])].filter((each) => each.checkVisibility())"
            ".map((each) => each.textContent.trim().replace(/\\s+/g, ' '))",
            css,
        )

    def text(self, css: str) -> str:
        (text,) = self.texts(css)
        return text

    def click(self, css: str, text: str = "") -> None:
        """Clicks the one element that says ``text``."""
        (found,) = [each for each in self.all(css) if text in each.text]
        found.click()

    def keys(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def focused(self) -> str:
        return self.js("document.activeElement.textContent || document.activeElement.id")

    def names(self) -> list[str]:
        return self.texts("#table tbody td.name")

    def linked(self) -> list[list[str]]:
        """Lines of the chosen weights, in each pane."""
        return [self.texts(f"figure:nth-child({side}) .line.linked") for side in (1, 2)]

    def media(self, **features: str) -> None:
        values = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": values})

    def width(self, pixels: int) -> None:
        metrics = {"width": pixels, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
