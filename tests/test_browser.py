"""Pages as a browser shows them: a run's report, a study's, and the page that watches. Chromium, headless and without a network."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from fedsim.cli import app
from fedsim.compare import compare
from fedsim.grid import load_study
from fedsim.report import write_report
from fedsim.watch import open_server

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed; pip install -e '.[test]'")

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no browser; apt-get install chromium chromium-driver")

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1200,900"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
STUDY = """\
study: pages
asks: What does a browser make of it?
scenario: quickstart
strategies: {fedavg: fedavg, gentle: {name: fedavg, server_lr: 0.3}, scaffold: scaffold}
seeds: 2
over: {data.partition.alpha: [0.3, 3]}
set: {rounds: 4, evaluate.every: 2}
target: 0.3
"""
KINDS = ("run", "study", "watch")
CONTRAST = """
const [selector] = arguments;
const channels = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (rgb) => {
  const [r, g, b] = rgb.slice(0, 3).map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const colour = channels(getComputedStyle(e).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
return [...document.querySelectorAll(selector)].filter((e) => e.textContent.trim() && e.getClientRects().length).map((e) => {
  const style = getComputedStyle(e);
  const ink = channels(e instanceof SVGElement ? style.fill : style.color);
  const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
  return [(a + 0.05) / (b + 0.05), e.textContent.trim().slice(0, 40)];
});
"""
"""WCAG's contrast of each text to what is behind it."""

TEXTS = (
    "h1, h2, p, dt, dd, small, th, td, figcaption b, figcaption span, nav a, td a, "
    "footer, pre, .kind, .legendtext, .xtick text, .ytick text, .xtitle"
)


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Where the three pages are."""
    root = tmp_path_factory.mktemp("pages")
    fast = ["--set", "rounds=8", "--set", "evaluate.every=2", "--quiet", "--output", str(root / "run")]
    assert CliRunner().invoke(app, ["run", "quickstart", *fast]).exit_code == 0
    (root / "it.yaml").write_text(STUDY)
    for _ in compare(load_study(root / "it.yaml", {}), root / "study"):
        pass
    pages = {kind: write_report(root / kind).as_uri() for kind in ("run", "study")}
    server = open_server(root, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield pages | {"watch": f"http://127.0.0.1:{server.server_address[1]}/"}  # type: ignore[str-bytes-safe]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = Service(DRIVER, log_output=os.devnull)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()
        if service.log_output and hasattr(service.log_output, "close"):
            service.log_output.close()  # selenium leaves it open


def wait(condition: Callable[[], Any], what: str, seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {what}")


def show(browser: Any, address: str, theme: str = "light", width: int = 1200) -> None:
    """Open a page and wait until everything is drawn."""
    for log in ("browser", "performance"):
        browser.get_log(log)  # what belongs to the page before
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(address)
    wait(lambda: browser.execute_script("return document.documentElement.dataset.drawn") == theme, f"{address} drawn in {theme}")


def requests(browser: Any) -> list[str]:
    """Addresses of everything that was asked for."""
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_loads_without_errors_and_asks_nobody_else(browser: Any, addresses: dict[str, str], kind: str) -> None:
    show(browser, addresses[kind])
    if kind == "watch":
        time.sleep(2.3)  # until it has asked again
    asked = requests(browser)
    assert addresses[kind] in asked
    allowed = ("data:", "blob:", addresses["watch"] if kind == "watch" else addresses[kind])
    assert [url for url in asked if not url.startswith(allowed)] == []
    assert sum(url.endswith("/runs") for url in asked) == 0 if kind != "watch" else 2
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_is_drawn(browser: Any, addresses: dict[str, str], kind: str) -> None:
    show(browser, addresses[kind])
    sizes = browser.execute_script(
        """return [...document.querySelectorAll(".plot")].map((plot) => {
             const svg = plot.querySelector("svg.main-svg"), box = svg ? svg.getBoundingClientRect() : {width: 0, height: 0};
             const inside = plot.querySelector(".plot path, .scatterlayer path, .heatmaplayer image, .barlayer path");
             return [box.width, box.height, inside !== null];
           })"""
    )
    assert len(sizes) >= {"run": 10, "study": 8, "watch": 1}[kind]
    assert all(width > 200 and height > 150 and inside for width, height, inside in sizes), sizes
    clipped = browser.execute_script(
        """return [...document.querySelectorAll(".plot")].flatMap((plot) => {
             const outer = plot.getBoundingClientRect();
             return [...plot.querySelectorAll(".xtick text, .ytick text, .xtitle, .ytitle, .legendtext")].filter((text) => {
               const box = text.getBoundingClientRect();
               return box.left < outer.left - 1 || box.right > outer.right + 1 || box.bottom > outer.bottom + 1;
             }).map((text) => text.textContent);
           })"""
    )
    assert clipped == [], "labels are whole"


def first_with_legend(browser: Any) -> Any:
    """The first plot that has a legend, scrolled to."""
    script = """const plot = [...document.querySelectorAll(".plot")].find((p) => p.querySelector(".legendtoggle"));
                document.documentElement.style.scrollBehavior = "auto";
                plot.scrollIntoView({block: "center"}); return plot"""
    return browser.execute_script(script)


@pytest.mark.parametrize("kind", KINDS)
def test_hovering_tells_values(browser: Any, addresses: dict[str, str], kind: str) -> None:
    from selenium.webdriver import ActionChains

    show(browser, addresses[kind])
    plot = first_with_legend(browser)
    area = plot.find_element("css selector", ".nsewdrag")
    ActionChains(browser, duration=50).move_to_element_with_offset(area, 30, 10).move_to_element(area).perform()
    labels = wait(lambda: [e.text for e in plot.find_elements("css selector", ".hoverlayer text") if e.text], "a label")
    assert any(character.isdigit() for character in "".join(labels))


@pytest.mark.parametrize("kind", KINDS)
def test_a_click_in_the_legend_hides_a_curve(browser: Any, addresses: dict[str, str], kind: str) -> None:
    show(browser, addresses[kind])
    plot = first_with_legend(browser)

    def shown() -> int:
        return int(browser.execute_script("return arguments[0].querySelectorAll('.scatterlayer .trace').length", plot))

    before = shown()
    for now_fewer in (True, False):
        from selenium.webdriver import ActionChains

        ActionChains(browser, duration=50).move_to_element(plot.find_element("css selector", ".legendtoggle")).click().perform()
        wait(lambda fewer=now_fewer: (shown() < before) == fewer, "the legend's answer")  # type: ignore[misc]
        time.sleep(0.4)  # two clicks in a row would be a double click
    assert shown() == before


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_follows_the_systems_theme_and_is_readable(browser: Any, addresses: dict[str, str], kind: str, theme: str) -> None:
    show(browser, addresses[kind], theme)
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(c) for c in paper.removeprefix("rgb(").removesuffix(")").split(",")) / 3
    assert brightness < 40 if theme == "dark" else brightness > 240
    found = browser.execute_script(CONTRAST, TEXTS)
    assert len(found) > 30
    assert [(round(ratio, 2), text) for ratio, text in found if ratio < 4.5] == []
    small = browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].filter((e) => parseFloat(getComputedStyle(e).fontSize) < 11).length", TEXTS
    )
    assert small == 0


def test_the_button_changes_the_theme(browser: Any, addresses: dict[str, str]) -> None:
    show(browser, addresses["run"])
    button = browser.find_element("id", "theme")
    for theme in ("dark", "light"):
        button.click()
        wait(lambda now=theme: browser.execute_script("return document.documentElement.dataset.drawn") == now, theme)  # type: ignore[misc]
    browser.execute_script("localStorage.clear()")


@pytest.mark.parametrize("kind", KINDS)
def test_a_phone_shows_it_without_scrolling_sideways(browser: Any, addresses: dict[str, str], kind: str) -> None:
    show(browser, addresses[kind], width=400)
    wide, inner = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= inner == 400
    plots = browser.execute_script(
        "return [...document.querySelectorAll('.plot svg.main-svg')].map((e) => e.getBoundingClientRect().right)"
    )
    assert plots
    assert max(plots) <= 400


def test_the_list_leads_to_reports_that_work(browser: Any, addresses: dict[str, str]) -> None:
    show(browser, addresses["watch"])
    names = [e.text for e in browser.find_elements("css selector", "#rows a")]
    assert "run" in names
    assert len(names) == 1 + 12
    for link in ("run", "study"):
        show(browser, f"{addresses['watch']}report/{link}")
        assert browser.get_log("browser") == []
        assert [url for url in requests(browser) if not url.startswith((addresses["watch"], "data:", "blob:"))] == []
