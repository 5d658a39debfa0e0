"""The run in one page: of a real run, opened in a real browser, at the width of a desktop and of a phone, light and dark."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_program

from eval.curves import POINTS, curve, thin, ticks
from eval.html import newest, page, read_metrics
from runtime.errors import UserError
from runtime.metrics import read_jsonl

BROWSER = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
HOSTILE = '"><img src=x onerror=document.title="owned"><script>document.title="owned"</script>'


@pytest.fixture(scope="module")
def run(tiny_shards, tmp_path_factory) -> Path:
    """A run with everything that a page shows: trained, evaluated, with pictures; and with hostile text."""
    folder = tmp_path_factory.mktemp("page") / "a <b>run"
    config = folder.with_name("run.yaml")
    config.write_text(
        f"""
data:
  shards: {tiny_shards}
  holdout: 0.1
  views: [{{count: 2, size: 32, scale: [0.4, 1.0], teacher: true}}]
model: {{arch: custom, patch: 8, width: 24, depth: 2, heads: 2}}
reference: {{points: 2}}
head: {{hidden: 32, bottleneck: 16, prototypes: 40}}
optim: {{global_batch_size: 16, epochs: 3, warmup_epochs: 1}}
speed: {{compile: false, workers: 0, device: cpu}}
run: {{folder: "{folder}", log_every: 2}}
"""
    )
    run_program("train.py", config)
    run_program("-m", "eval", "report", folder)
    run_program("-m", "tools.show", "views", folder)
    rows = [
        {"time": "2026-01-01", "what": "knn", "network": HOSTILE, "top1": 12.5, "words": "x" * 300},
        {"time": "2026-01-02", "what": "knn", "network": "b", "top1": 14.25},
        {"what": HOSTILE, "last": {"miou": 3.0, "iou": [1, 2]}},
    ]
    with open(folder / "evaluations.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    stdout = run_program("-m", "eval", "html", folder).stdout
    assert stdout == f"the run in one page: {folder}/report.html\n"
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver here (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for option in (*BROWSER, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(option)
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def open_page(browser: Any, page: Path, width: int, dark: bool = False) -> None:
    """Open the page on a screen of this width, with all details open."""
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    browser.get(page.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(details => details.open = true)")


def test_it_is_complete_and_loads_nothing(browser, run):
    open_page(browser, run / "report.html", 1200)
    text = browser.find_element("tag name", "body").text
    assert text.startswith(f"{run.parent.name}/a <b>run\n")
    for title in ("Results", "Learning", "Speed", "Pictures", "Configuration", "Versions"):
        assert title in text
    results = json.loads((run / "results.json").read_text())
    last = read_metrics(run)[-1]
    assert f"{results['knn_top1']:.2f}" in text
    assert f"3 of 3\nepochs, {last['step']} steps" in text
    assert f"{last['loss']:.2f}\nloss" in text
    assert "k-NN top-1, [CLS]" in text
    assert "12.50 14.25" in text  # evaluations of a kind are side by side
    assert "last miou" in text
    assert "prototypes: 40" in text
    assert "torch" in text.split("Versions")[1]
    assert HOSTILE in text  # as text, not as HTML
    assert browser.title == "a <b>run"

    not_alone = {"step", "epoch", "cls_loss", "reference_loss"}  # the losses share a chart
    curves = {
        name for row in read_metrics(run) for name, value in row.items() if isinstance(value, int | float)
    } - not_alone
    assert len(browser.find_elements("css selector", "figure > svg")) == len(curves)
    pictures = browser.find_elements("tag name", "img")
    assert len(pictures) == len(list((run / "pictures").glob("*.png")))
    assert all(int(picture.get_property("naturalWidth")) > 100 for picture in pictures)
    assert not browser.find_elements("tag name", "script")
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith("data:") for name in loaded)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_nothing_overflows(browser, run, width):
    """No horizontal scrolling, and nothing is cut off at the edge."""
    open_page(browser, run / "report.html", width)
    page_width, window_width = browser.execute_script(
        "return [document.documentElement.scrollWidth, window.innerWidth]"
    )
    assert page_width <= window_width == width
    script = """return [...document.querySelectorAll('h1, h2, p, figure, svg, img, .tiles div, .scroll')]
        .filter(e => e.getBoundingClientRect().right > window.innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    assert browser.execute_script(script) == []
    sizes = "return [...document.querySelectorAll('figure svg text')].map(e => e.getBoundingClientRect().height)"
    assert min(browser.execute_script(sizes)) > 7  # pixels: the numbers of a chart are legible


def test_light_and_dark(browser, run):
    def luminance(color: str) -> float:
        channels = [int(c) / 255 for c in color[color.index("(") + 1 : -1].split(",")[:3]]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    backgrounds = []
    for dark in (False, True):
        open_page(browser, run / "report.html", 390, dark)
        script = "const s = getComputedStyle(arguments[0]); return [s.color, s.backgroundColor, s.fill, s.stroke]"
        text, background, _, _ = browser.execute_script(script, browser.find_element("tag name", "body"))
        tick = browser.find_element("css selector", "figure svg text")
        *_, fill, _ = browser.execute_script(script, tick)
        for front in (text, fill):  # WCAG's contrast of at least 4.5
            bright, dim = sorted((luminance(front), luminance(background)))[::-1]
            assert (bright + 0.05) / (dim + 0.05) > 4.5
        backgrounds.append(luminance(background))
    assert backgrounds[0] > 0.9
    assert backgrounds[1] < 0.1


def test_incomplete_runs(run, tmp_path):
    """A run that has just started, files cut off in the middle of a line, steps that were run twice."""
    shutil.copy(run / "config.yaml", tmp_path)
    assert "No metrics yet." in page(tmp_path)
    assert "<svg" not in page(tmp_path)
    rows = [
        {"step": step, "epoch": step / 10, "loss": loss}
        for step, loss in ((2, 5.0), (4, 4.0), (6, 9.0), (4, 3.0), (6, 2.0))
    ]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 8, "lo')
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(2, 5.0), (4, 3.0), (6, 2.0)]
    (tmp_path / "results.json").write_text('{"knn_top1": 5')
    (tmp_path / "measures.json").write_text('{"networks": {"one": {"linear_top1": 7.25}, "two": {"linear_top1": 8.5}}}')
    several = {"networks": {f"n{n}": {"linear_top1": n + 0.25} for n in range(8)}}
    several["means"] = {"n": {"of": 8, "linear_top1": 3.75, "spread": {"linear_top1": [0.25, 7.25]}}}
    (tmp_path / "measures.json").write_text(json.dumps(several))
    html = page(tmp_path)
    assert ">3.75 (0.2 – 7.2)</td>" in html
    assert all(f">{n}.25<" in html for n in range(8))  # none is left out
    (tmp_path / "measures.json").write_text('{"networks": {"one": {"linear_top1": "x"}}}')  # of another version
    assert "linear top-1" not in page(tmp_path)
    (tmp_path / "measures.json").write_text('{"networks": {"one": {"linear_top1": 7.25}, "two": {"linear_top1": 8.5}}}')
    (tmp_path / "damaged.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    html = page(tmp_path)
    assert html.count("<svg") == 1
    assert ">7.25<" in html
    assert ">8.50<" in html
    assert "linear top-1, best probe" in html
    assert "2 damaged samples" in html
    with open(tmp_path / "metrics.jsonl", "a") as file:  # a metric that the page does not know is shown
        file.write('\n{"step": 10, "epoch": 1.0, "loss": 2.0, "something_new": 33.0}\n')
    assert "Other metrics" in page(tmp_path)
    assert page(tmp_path).count("<svg") == 2
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "epoch": 1.2, "loss": 2.0, "knn_top1": 33.0}\n')
    assert "k-NN top-1 while training" in page(tmp_path)
    # a long run's curves are thinned, and an infinite loss does not stop the page
    rows = [{"step": n, "epoch": n / 100, "loss": float("nan") if n == 7 else 5 + n % 3} for n in range(1, 40_001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(page(tmp_path)) < 200 * POINTS + 20_000
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 40_000
    with pytest.raises(UserError, match=r"nothing: not a run folder \(no config.yaml\)"):
        page(tmp_path / "nothing")


def test_thinning_keeps_mean_and_range():
    x, y = np.arange(1003.0), np.random.default_rng(0).normal(size=1003)
    pieces = np.array_split(np.arange(1003), POINTS)
    wanted = [[f(y[piece]) for piece in pieces] for f in (np.mean, np.min, np.max)]
    at, *thinned = thin(x, y)
    assert at.tolist() == [piece[-1] for piece in pieces]
    for one, other in zip(thinned, wanted, strict=True):
        np.testing.assert_allclose(one, other)
    assert thin(x[:3], y[:3])[1].tolist() == y[:3].tolist()


def test_ticks_are_round_and_within_the_range():
    assert [text for _, text in ticks(0, 1, 5)] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert [text for _, text in ticks(-3, 27_000, 5)] == ["0", "10000", "20000"]
    assert [text for _, text in ticks(0, 1e-4, 4)] == ["0", "2.5e-05", "5e-05", "7.5e-05", "0.0001"]


def test_a_curve_has_a_gap_where_a_value_is_not_finite():
    rows = [{"step": n, "loss": float("nan") if n == 4 else float("inf") if n == 7 else 0.0} for n in range(10)]
    drawing = curve(rows, "Loss", "nats", ("loss",))
    assert drawing.count("<polyline") == 3
    assert "nan" not in drawing
    assert "inf" not in drawing
    assert curve([{"step": 1, "loss": float("nan")}], "Loss", "", ("loss",)).startswith("<svg")


def test_several_runs_in_one_page(browser, run, tmp_path):
    """Runs of one name, with other metrics and configs; one that has not trained yet; a file of the user's own."""
    for n, name in enumerate(("one/run", "two/run", "new")):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        text = (run / "config.yaml").read_text().replace("prototypes: 40", f"prototypes: {40 + n}")
        (folder / "config.yaml").write_text(text)
        rows = [{"step": step, "epoch": step / 4, "loss": 5.0 - n, "own": 1} for step in (2, 4)]
        if name != "new":
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "two/run/metrics.jsonl").write_text('{"step": 3, "loss": 2.5}\n')  # no epochs: then steps
    runs = [tmp_path / "one/run", tmp_path / "two/run", tmp_path / "new"]
    out = run_program("-m", "eval", "html", *runs).stdout
    assert out == f"3 runs in one page: {tmp_path}/curves.html\n"
    run_program("-m", "eval", "html", *runs)  # a page of ours is written again
    for width in (320, 1200):
        open_page(browser, tmp_path / "curves.html", width)
        page_width = browser.execute_script("return document.documentElement.scrollWidth")
        assert page_width <= width
    text = browser.find_element("tag name", "body").text
    assert "one/run, two/run, " in text
    assert "head.prototypes 40 41 42" in text
    assert "optim.epochs" not in text  # equal
    loss, own = browser.find_elements("css selector", "figure > svg")
    assert loss.text.split("\n")[:2] == ["one/run", "two/run"]
    assert "steps" in loss.text
    assert "epochs" in own.text
    assert len(loss.find_elements("tag name", "polyline")) == 2

    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    for words, message in (
        ((*runs, "--out", mine), f"{mine}: exists, and is no page of this program"),
        ((runs[0], runs[0]), f"{runs[0]}: the same run twice"),
        ((runs[0], tmp_path), f"{tmp_path}: not a run folder (no config.yaml)"),
        ((runs[0], "--out", mine), "the page of one run is RUN/report.html"),
    ):
        assert message in run_program("-m", "eval", "html", *words, expect=2).stderr
    assert mine.read_text() == "<p>mine</p>"


def test_what_was_measured_later_is_part_of_its_step(tmp_path):
    """Rows of measures come after those of later steps, and some of steps that have no other row."""
    rows: list[dict[str, float]] = [{"step": step, "epoch": step / 10, "loss": 9.0 - step} for step in (2, 4, 6)]
    rows[2:2] = [{"step": 2, "epoch": 0.2, "knn_top1": 30.0}, {"step": 3, "epoch": 0.3, "linear_seg_miou": 20.0}]
    rows.append({"step": 7, "epoch": 0.7, "knn_top1": 40.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    joined = read_metrics(tmp_path)
    assert [row["step"] for row in joined] == [2, 3, 4, 6, 7]
    assert joined[0] == {"step": 2, "epoch": 0.2, "loss": 7.0, "knn_top1": 30.0}
    assert newest(joined) == {"step": 7, "epoch": 0.7, "loss": 3.0, "knn_top1": 40.0, "linear_seg_miou": 20.0}
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    text = page(tmp_path)
    assert "Linear segmentation while training" in text
    assert "k-NN top-1 while training" in text
