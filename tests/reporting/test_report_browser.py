"""The report in Chromium at three widths and in print: it draws all, filters, and says nothing on the console.

Needs the extra `browser`, and Chromium with its driver (Debian: chromium, chromium-driver).
"""

from __future__ import annotations

import base64
import importlib.util
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from jaxrl_llm.reporting.drawn_curves import series, smoothed
from jaxrl_llm.reporting.report import write_report
from jaxrl_llm.reporting.reported_run import read_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("chromium") is None or importlib.util.find_spec("selenium") is None, reason="needs Chromium"
    ),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("report_runs", Path(__file__).with_name("test_report.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = tmp_path_factory.mktemp("report")
    runs = [read_run(module.made_run(path / f"run{seed}", steps=1000, seed=seed)) for seed in range(2)]
    return write_report(runs, path / "page.html")


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def opened(browser, page, width, **media):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media or {"media": ""})
    browser.get(page.as_uri())
    until = time.monotonic() + 30
    while browser.execute_script("return document.documentElement.dataset.ready") != "yes":
        assert time.monotonic() < until
        time.sleep(0.05)


def test_it_opens_with_little_work(browser, page):
    # Processor time of the page's thread: seconds by the clock depend on what else the machine does.
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    opened(browser, page, 1440)
    time.sleep(0.5)
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    browser.execute_cdp_cmd("Performance.disable", {})
    assert {each["name"]: each["value"] for each in metrics}["TaskDuration"] < 1.0
    assert page.stat().st_size < 2e6


@pytest.mark.parametrize("width", [360, 768, 1440])
def test_everything_is_drawn_and_fits_the_screen(browser, page, width):
    opened(browser, page, width)
    for chart in browser.find_elements("css selector", ".chart"):
        browser.execute_script("arguments[0].scrollIntoView()", chart)
        time.sleep(0.1)
    time.sleep(0.5)
    drawn = browser.execute_script(
        "return charts.map(c => c.querySelectorAll('.scatterlayer .trace, .bars .point').length)"
    )
    assert len(drawn) > 15
    assert all(drawn)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    offered = {each.get_attribute("data-title") for each in browser.find_elements("css selector", ".modebar-btn")}
    assert offered == {"Download plot", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}  # nothing leaves the page
    constant = "return new Set(averaged(data.groups[0], 'correct_share', 0.8).parts.flatMap(part => part.mean)).size"
    assert browser.execute_script(constant) == 1
    assert browser.get_log("browser") == []


def test_the_page_smooths_as_the_figures_do_within_each_stage(browser, page):
    opened(browser, page, 1440)
    runs = [read_run(page.parent / f"run{seed}") for seed in range(2)]
    own = [series(run, from_last_stage=True)["gradient_norm"] for run in runs]
    parts = browser.execute_script("return averaged(data.groups[0], 'gradient_norm', 0.8).parts")
    assert [(part["x"][0], part["x"][-1]) for part in parts] == [(-19, 0), (1, 980)]
    for part, piece in zip(parts, (slice(0, 20), slice(20, 1000)), strict=True):
        both = np.array([smoothed(steps[piece], values[piece]) for steps, values in own])
        assert part["mean"] == pytest.approx(both.mean(0), rel=1e-5)
        assert part["high"] == pytest.approx(both.max(0), rel=1e-5)
    drawn = "return curves(data.panels.find(panel => panel.metrics.includes('learning_rate')), 0.8)"
    assert {value for trace in browser.execute_script(drawn) for value in trace["y"]} == {1e-4}
    assert browser.execute_script("return shareAxis([{y: [0, 0]}])") == {"range": [0, 1]}


def test_filters_leave_what_fits_and_texts_stay_text(browser, page):
    opened(browser, page, 1440)
    assert browser.title != "taken"
    assert "</script>" in browser.find_element("css selector", ".sample pre").text

    def count(**filters):
        for name, value in filters.items():
            browser.execute_script(
                "form.elements[arguments[0]].value = arguments[1]; form.dispatchEvent(new Event('input'))", name, value
            )
        return browser.execute_script("return chosen().length")

    every = count()
    assert 0 < count(correct="true") < every
    assert browser.find_elements("css selector", ".sample .right")
    assert not browser.find_elements("css selector", ".sample .wrong")
    assert "answer_match" in browser.find_element("css selector", ".sample dl").text
    assert count(correct="", run="run1") < every
    assert count(run="", step_min="990", step_max="1000") < every
    assert count(text="no such text") == 0
    assert browser.find_element("id", "found").text == "No sample fits."
    browser.find_element("css selector", "button[type=reset]").click()
    time.sleep(0.2)
    assert count() == every
    assert count(colour="logprob", **{"from": "training"}) > 0
    marked = browser.find_elements("css selector", ".sample .token")
    assert any("background" in (each.get_attribute("style") or "") for each in marked)
    assert browser.get_log("browser") == []


def test_print_and_darkness(browser, page):
    opened(browser, page, 1000, features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
    opened(browser, page, 1000)
    paper = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert paper.startswith(b"%PDF")
    assert len(paper) > 50_000
    assert browser.execute_script("return charts.every(c => c.dataset.drawn)")
    width = "return Math.max(...charts.map(c => c.querySelector('.main-svg').clientWidth))"
    assert browser.execute_script(f"dispatchEvent(new Event('beforeprint')); {width}") == 310  # two fit on a page
    assert browser.execute_script(f"dispatchEvent(new Event('afterprint')); {width}") > 310
    assert browser.get_log("browser") == []
