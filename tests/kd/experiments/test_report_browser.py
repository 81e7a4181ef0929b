"""The page in a real browser: narrow and wide, light and dark, printed, and without the network."""
import re
import shutil

import pytest
import torch
from report_pages import trained
from run_folders import run_config, write_run

from kd.experiments.report.page import Analyze, write_report
from kd.work_dir.records import read_runs

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra browser")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
             "--disable-sync"]
A4 = (595, 842)  # in points
MOST = 300_000   # milliseconds, on a busy machine
EVIL = "<script>alert(1)</script>"

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser is installed: none of {', '.join(NAMES)}")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as engine:
        started = engine.chromium.launch(executable_path=BROWSER, args=ARGUMENTS, timeout=MOST)  # with an empty profile
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page with all parts, one about many runs with long names and classes that are markup, and one about one run."""
    folder = tmp_path_factory.mktemp("pages")
    runs = read_runs(trained(folder / "trained"))[0]
    write_report(runs, folder / "full.html", f"python scripts/report.py {300 * 'x'}", title=EVIL,
                 analyze=Analyze(torch.device("cpu"), 0.9))
    paths = []
    for i in range(14):
        cfg = run_config(methods=("CrossKD",) * (i > 0), teacher="gone.pth", epochs=3)
        if i:
            cfg["distill"]["methods"][0]["weight"] = i
        paths.append(write_run(folder / "many" / f"{'a_long_name_of_a_run_' * 3}{i}", [0.1, 0.2, 0.2 + i / 50], cfg))
        metrics = paths[-1] / "metrics.jsonl"
        metrics.write_text(metrics.read_text().replace("ring", "</td><script>alert(2)</script>").replace(
            '"disc"', '"averylongclassnamewithoutanyplacetobreak' + 40 * "x" + '"'))
    write_report(read_runs(paths)[0], folder / "many.html", "python scripts/report.py")
    write_report(read_runs(paths[:1])[0], folder / "one.html", "python scripts/report.py")
    return folder


@pytest.fixture
def window(browser):
    """A window, with lists of what it asked for and of the messages of its console."""
    window = browser.new_page()
    window.set_default_timeout(MOST)
    window.asked, window.messages = [], []
    window.on("request", lambda request: window.asked.append(request.url))
    window.on("console", lambda message: window.messages.append(message.text))
    window.on("pageerror", lambda error: window.messages.append(str(error)))
    window.on("dialog", lambda dialog: window.messages.append(dialog.message))
    yield window
    window.close()


def width_of(window):
    return window.evaluate("document.scrollingElement.scrollWidth")


@pytest.mark.parametrize("name", ["full", "many", "one"])
def test_it_fits_and_loads_nothing(window, pages, name):
    file = pages / f"{name}.html"
    window.goto(file.as_uri())
    for scheme, ground in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 26)")):
        window.emulate_media(color_scheme=scheme)
        assert window.evaluate("getComputedStyle(document.body).backgroundColor") == ground
        for width in (390, 1440):
            window.set_viewport_size({"width": width, "height": 900})
            assert width_of(window) <= width
    window.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    for width in (390, 1440):
        window.set_viewport_size({"width": width, "height": 900})
        assert width_of(window) <= width
    assert window.messages == [] and [url for url in window.asked if not url.startswith("data:")] == [file.as_uri()]


def test_pictures_and_charts_can_be_read(window, pages):
    window.set_viewport_size({"width": 390, "height": 900})
    window.goto((pages / "full.html").as_uri())
    boxes = window.evaluate("[...document.querySelectorAll('svg.chart, .shots svg, .shots image, .shots use')].map("
                            "one => [one.getBoundingClientRect().width, one.getBoundingClientRect().height])")
    assert len(boxes) > 20 and all(100 < width <= 390 and height > 60 for width, height in boxes), boxes
    smallest = window.evaluate("Math.min(...[...document.querySelectorAll('.chart .labels text')].map("
                               "one => parseFloat(getComputedStyle(one).fontSize) * Math.hypot(one.getScreenCTM().a, "
                               "one.getScreenCTM().b)))")
    assert smallest >= 10  # pixels
    assert window.title() == EVIL and window.locator("h1").inner_text() == EVIL


@pytest.mark.parametrize("name", ["full", "many"])
def test_it_prints_on_a4(window, pages, name):
    """White also where the screen is dark, and with the commands that are folded on the screen."""
    window.emulate_media(color_scheme="dark")
    window.goto((pages / f"{name}.html").as_uri())
    content = window.pdf(prefer_css_page_size=True, print_background=True)
    boxes = [[float(side) for side in box.split()] for box in re.findall(rb"/MediaBox\s*\[([^\]]+)\]", content)]
    assert boxes and all(box == pytest.approx([0, 0, *A4], abs=1) for box in boxes), boxes
    window.emulate_media(media="print")
    assert window.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert window.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    window.set_viewport_size({"width": 703, "height": 1000})  # the printed width in CSS pixels, 186 mm
    assert width_of(window) <= 703
    assert window.evaluate("document.querySelector('#origin dl').getBoundingClientRect().height") > 20
