"""The page in a real headless browser: what a reader, a keyboard, a phone and a printer get of it."""

from __future__ import annotations

import json

import pytest

from .stored import cell, matrix, write

#: WCAG 2.2, success criterion 1.4.3
LEAST_CONTRAST = 4.5
#: Milliseconds to the end of the load event; bytes
LONGEST_LOAD_MS, LARGEST_PAGE = 2000, 5_000_000
#: CSS pixels between the margins of A4 landscape
PRINT_WIDTH = 1032

#: Text nodes whose colour is too close to what is painted behind them, as [text, contrast]
POOR_CONTRAST = """
const rgb = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
function behind(element) {
  for (let at = element; at; at = at.parentElement) {
    const color = at instanceof SVGElement ? [0, 0, 0, 0] : rgb(getComputedStyle(at).backgroundColor);
    if (color.length < 4 || color[3] === 1) return color;
  }
  throw new Error("nothing behind " + element.outerHTML);
}
const poor = new Map();
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let checked = 0;
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
  if (["TITLE", "DESC", "SCRIPT", "title", "desc"].includes(element.tagName)) continue;
  const style = getComputedStyle(element);
  const ink = rgb(element instanceof SVGElement ? style.fill : style.color);
  const [a, b] = [light(ink), light(behind(element))].sort((x, y) => y - x);
  checked += 1;
  if ((a + 0.05) / (b + 0.05) < arguments[0])
    poor.set(element.tagName + "." + element.className, [element.textContent, (a + 0.05) / (b + 0.05)]);
}
return [checked, [...poor.entries()]];
"""


@pytest.fixture
def screen(browser):
    """Sets the size and the media of the page; all is as it was after the test."""

    def change(width: int = 1280, media: str = "screen", scheme: str = "light", mobile: bool = False) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": mobile}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})

    yield change
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


@pytest.fixture
def opened(browser):
    """Opens a page and forgets what the log held before."""

    def open_page(path):
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(path.as_uri())
        return browser

    return open_page


def requests(browser) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


def press(browser, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def test_the_page_asks_nothing_of_a_network_and_complains_of_nothing(opened, full_page):
    browser = opened(full_page)
    assert requests(browser) == [full_page.as_uri()]
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []


def test_the_heat_map_holds_the_figures_of_the_file(opened, full_page):
    shown = opened(full_page).execute_script(
        """const table = [...document.querySelectorAll("table.heatmap")].find(
             (one) => one.caption.id === "heat-1");
           const names = [...table.tHead.rows[0].cells].map((one) => one.textContent);
           return [...table.tBodies[0].rows].flatMap((row) => [...row.cells].slice(1).map((cell, i) =>
             [row.cells[0].textContent, names[i + 1], Number(cell.dataset.v), cell.textContent]))"""
    )
    stored = {
        (info["baseline"], info["workload"]): info["ratio_to_local"]
        for info in (bench["extra_info"] for bench in matrix(seed=2))
        if info["workload"] != "link"
    }
    assert {(row, column): value for row, column, value, _ in shown} == stored
    assert len(shown) == 35
    for _, _, value, text in shown:
        assert float(text[:-1]) == pytest.approx(value, rel=0.006, abs=0.005)


def test_a_ratio_leads_to_its_open_cell_even_without_scripts(opened, browser, small_page):
    from selenium.webdriver import Keys

    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened(small_page)
        browser.find_element("css selector", ".heatmap tr:nth-child(2) td a").send_keys(Keys.ENTER)
        details = browser.find_elements("css selector", "details.cell")
        assert [one.get_attribute("open") is not None for one in details] == [False, True, False]
        assert "Quantiles of 7 samples" in details[1].text
        assert not browser.find_element("css selector", ".tools").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_the_keyboard_reaches_regions_and_opens_details(opened, small_page):
    from selenium.webdriver import Keys

    browser = opened(small_page)
    press(browser, Keys.TAB)
    assert browser.switch_to.active_element.text == "Skip to the results"
    seen = set()
    for _ in range(150):
        press(browser, Keys.TAB)
        at = browser.execute_script(
            "const at = document.activeElement; return at.role || at.tagName.toLowerCase()"
        )
        seen.add(at)
        if at == "summary":
            break
    assert {"region", "a", "button", "summary"} <= seen
    width = browser.execute_script("return getComputedStyle(document.activeElement).outlineWidth")
    assert width == "3px"  # one sees where one is
    press(browser, Keys.ENTER)
    assert browser.execute_script("return document.activeElement.parentElement.open")
    assert "median" in browser.find_element("css selector", "details.cell[open] .inside").text


def test_a_phone_never_scrolls_the_page_sideways(opened, screen, full_page):
    screen(360, mobile=True)
    browser = opened(full_page)
    browser.execute_script("document.querySelectorAll('details').forEach((one) => one.open = true)")
    for width in (360, 320):
        screen(width, mobile=True)
        sizes = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert sizes == [width, width]
    # A table that is wider scrolls in a region of its own, which the keyboard can reach.
    assert browser.execute_script(
        """const wide = [...document.querySelectorAll("table")].map((one) => one.parentElement)
             .filter((one) => one.scrollWidth > one.clientWidth);
           return wide.length > 5 && wide.every((one) => one.tabIndex === 0 && one.role === "region")"""
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(opened, screen, full_page, scheme):
    screen(scheme=scheme)
    browser = opened(full_page)
    # All cells are made alike: a few stand for them, with all that can be opened in them.
    browser.execute_script(
        """const some = [...document.querySelectorAll("details.cell")].slice(0, 3);
           const inner = some.flatMap((one) => [...one.querySelectorAll("details")]);
           for (const one of [...some, ...inner]) one.open = true;"""
    )
    checked, poor = browser.execute_script(POOR_CONTRAST, LEAST_CONTRAST)
    assert checked > 1000
    assert poor == []


def test_every_colour_of_the_heat_map_has_contrast_in_both_schemes(opened, screen, small_page):
    for scheme in ("light", "dark"):
        screen(scheme=scheme)
        browser = opened(small_page)
        browser.execute_script(
            """const row = document.querySelector(".heatmap tbody tr");
               for (const key of document.querySelectorAll(".legend .key.heat")) {
                 const cell = row.insertCell();
                 cell.className = key.className.replace("key", "num");
                 cell.textContent = key.className;
               }"""
        )
        checked, poor = browser.execute_script(POOR_CONTRAST, LEAST_CONTRAST)
        assert checked > 20
        assert poor == []


def test_the_dark_scheme_is_dark_and_paper_is_white(opened, screen, small_page):
    def background() -> str:
        return browser.execute_script("return getComputedStyle(document.body).backgroundColor")

    browser = opened(small_page)
    screen(scheme="light")
    assert background() == "rgb(255, 255, 255)"
    screen(scheme="dark")
    assert background() == "rgb(21, 24, 28)"
    screen(scheme="dark", media="print")
    assert background() == "rgb(255, 255, 255)"


def test_print_shows_everything_and_cuts_no_table(opened, screen, full_page):
    browser = opened(full_page)
    assert browser.execute_script("return document.querySelectorAll('details[open]').length") == 0
    screen(PRINT_WIDTH, media="print")
    # What was closed counts as shown from the next frame on.
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    hidden, cut = browser.execute_script(
        """const inside = [...document.querySelectorAll("details > :not(summary)")];
           const visible = (one) => one.checkVisibility({contentVisibilityAuto: true})
             && one.getBoundingClientRect().height > 0;
           const tables = [...document.querySelectorAll("table")];
           return [inside.filter((one) => !visible(one)).length,
                   tables.filter((one) => one.getBoundingClientRect().right > innerWidth + 1)
                     .map((one) => one.caption.textContent)]"""
    )
    assert hidden == 0
    assert cut == []
    assert browser.execute_script("return document.querySelectorAll('details').length") > 70


def test_columns_sort_within_their_workload_and_cells_can_be_filtered(opened, full_page):
    browser = opened(full_page)
    click = """const table = document.getElementById("costs-1").closest("table");
      table.tHead.rows[0].cells[8].querySelector("button").click();
      const values = (body) => [...body.rows].slice(1).map((row) => Number(row.cells[8].dataset.v));
      return [table.querySelector("[aria-sort]").ariaSort, [...table.tBodies].map(values)]"""
    for direction in ("ascending", "descending"):
        told, groups = browser.execute_script(click)
        assert told == direction
        assert all(group == sorted(group, reverse=direction == "descending") for group in groups)
    field = browser.find_element("css selector", ".filter")
    field.send_keys("decode full")
    shown = [one.text for one in browser.find_elements("css selector", "#s1-cells ~ details.cell > summary")]
    assert [text.split()[0] for text in shown if text] == ["genie_full"]


def test_a_hostile_name_runs_nothing(opened, tmp_path):
    from genie.cli import main

    hostile = """</script><script>window.pwned=1</script><img src=x onerror="window.pwned=1">'"&"""
    path = write(tmp_path / "run.json", [cell(hostile, hostile, profile=hostile)])
    output = tmp_path / "report.html"
    assert main(["report", str(path), "-o", str(output)]) == 0
    browser = opened(output)
    assert browser.execute_script("return window.pwned === undefined && document.images.length === 0")
    assert hostile in browser.find_element("tag name", "main").text
    assert browser.get_log("browser") == []


def test_fifty_commits_of_the_matrix_open_quickly(opened, long_page):
    assert long_page.stat().st_size <= LARGEST_PAGE
    times = []
    for _ in range(3):  # the quickest: other processes only ever add
        browser = opened(long_page)
        navigation = "return performance.getEntriesByType('navigation')[0].loadEventEnd"
        times.append(browser.execute_script(navigation))
    assert 0 < min(times) <= LONGEST_LOAD_MS
    assert browser.execute_script("return document.querySelectorAll('svg .band').length") >= 35
