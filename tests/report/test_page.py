"""The page of results: its numbers are those of results.json, it needs no network, and it works in a browser."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from recon.cli import main
from recon.report import Results, draw_page
from recon.report.page.build import page_of, write_page
from recon.report.page.curves import MOST, read_curves
from tests.report.test_report import failed, report, tracked
from tests.report.test_sampling import row

DRIFT = {"split": "validation", "num_sequences": 4, "seq_len": 8}
PHASES = [
    {
        "phase": f"window 00{i}",
        "seconds": 1.0,
        "host_bytes": 2**20,
        "device_allocated_bytes": None,
        "categories": {"device": {"weights": 2**20, "activations": i * 2**19}, "host": {"calibration": 2**21}},
        "moment": {"device": {"stage": "step 1"}, "host": {"stage": ""}},
    }
    for i in (1, 2)
]


def comparison(run_dir: str = "runs/demo/{}") -> Results:
    """Two seeds of all scopes, a tuned row and a failed one, with everything that a page shows."""
    cells = []
    for seed in (0, 1):
        for i, (scope, add) in enumerate(
            {"dense": 0.0, "pruned": 9, "matrix": 5, "submodule": 2, "block": 1, "full": 4}.items()
        ):
            changes: dict[str, Any] = {"run_dir": run_dir.format(f"{scope}-{seed}"), "seconds": 1.5 + i + seed}
            accuracy = {"value": 0.7 - 0.05 * i, "stderr": 0.02}
            changes["tasks"] = {
                "cloze": {"main": "acc", "metrics": {"acc": accuracy}, "num_documents": 50, "num_fewshot": 0}
            }
            if scope not in ("dense", "pruned"):
                changes |= {
                    "ranks": tracked(10.0 + 8 * i + seed),
                    "drift": DRIFT | {"hidden": [0.1 / i, 0.2 / i], "kl": 0.5 / i},
                    "windows": {"000": {"before": 0.3, "after": 0.1}, "001": {"before": 0.2, "after": 0.1}},
                    "densities": {f"model.layers.{n}.mlp.{k}.weight": 0.4 + n / 10 for n in (0, 1) for k in "ab"},
                }
            if scope == "block":
                tried = ((1e-3, 12.5, False), (2e-3, 12.0, True), (4e-3, 12.2, False))
                changes["tuning"] = [
                    {"options": {"model.lr": lr}, "perplexity": value, "seconds": 2.0, "chosen": chosen}
                    for lr, value, chosen in tried
                ]
            cells.append(row(scope, float(add), seed, **changes))
        dense, pruned = (cell.perplexity for cell in cells[-6:-4])
        known = {"dense_perplexity": dense, "pruned_perplexity": pruned}
        cells[-6:] = [cell.replace(**known) for cell in cells[-6:]]
    cells.append(failed(label="block </script> x9", error="no room <b>here</b>"))
    return Results(cells, name="a & b", created="2026-11-26")


class Table(HTMLParser):
    """The cells of the tables of results that have a value: label, quantity, value and the files of its title."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.label, self.cells, self.links = "", [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [str(found[name]) for name in ("src", "href") if name in found]
        if tag == "tr":
            self.label = found.get("data-label") or ""
        if tag == "td" and found.get("data-value") is not None:
            self.cells.append((self.label, found["data-quantity"], float(str(found["data-value"])), found["title"]))


def charts(text: str) -> list[dict[str, Any]]:
    found = re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    return [json.loads(one) for one in found]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A page that `recon report --html` wrote, and the results.json that it was made from."""
    directory = tmp_path_factory.mktemp("demo")
    results = comparison(f"{directory}/{{}}")
    results.save(directory / "results.json")
    run = directory / "block-0"
    run.mkdir()
    (run / "config.yaml").write_text("model: <block>\n")
    (run / "memory.json").write_text(json.dumps({"phases": PHASES, "baseline_host_bytes": 1, "device": "cpu"}))
    (run / "logs").mkdir()
    (run / "logs" / "metrics.csv").write_text("step,loss,held_out_error\n9,0.5,\n15,,0.4\n19,0.3,\n")
    assert main(["report", str(directory), "--html"]) == 0
    return directory / "page.html", json.loads((directory / "results.json").read_text())


def expected(cells: list[dict[str, Any]], label: str, quantity: str) -> float:
    """The mean over seeds, from results.json alone."""
    own = [cell for cell in cells if cell["label"] == label and cell["status"] == "ok"]
    if quantity == "tracked_device_bytes":
        return fmean(max(sum(r["tracked"]["device"].values()) for r in c["ranks"] if "tracked" in r) for c in own)
    if quantity == "task_mean":
        return fmean(cell["task_mean"]["value"] for cell in own)
    return fmean(cell[quantity] for cell in own)


def test_all_numbers_equal_results_json_and_name_their_files(page: tuple[Path, dict[str, Any]]) -> None:
    text, cells = page[0].read_text(), page[1]["cells"]
    shown = Table(text).cells
    assert len(shown) >= 6 * 5
    for label, quantity, value, title in shown:
        assert value == pytest.approx(expected(cells, label, str(quantity)), rel=1e-12), (label, quantity)
        assert str(title).count("/report.json") == 2
        assert f"/{label}-1/report.json" in str(title)
    assert {"perplexity", "task_mean", "tracked_device_bytes"} <= {quantity for _, quantity, _, _ in shown}
    assert "</script> x9" not in text.replace("&lt;/script&gt; x9", "")
    assert "no room &lt;b&gt;here&lt;/b&gt;" in text


def test_charts_equal_results_json(page: tuple[Path, dict[str, Any]]) -> None:
    cells, found = page[1]["cells"], charts(page[0].read_text())
    memory, seconds, device, host, drift, loss, tuning, windows, density, *phases = found
    for chart, quantity, scale in ((memory, "tracked_device_bytes", 2**-20), (seconds, "seconds", 1)):
        points = {one["name"]: (one["x"][0], one["y"][0]) for one in chart["data"] if one["name"] != "front"}
        assert len(points) == 4
        for label, (x, y) in points.items():
            assert x == pytest.approx(scale * expected(cells, label, quantity))
            assert y == pytest.approx(expected(cells, label, "perplexity"))
    totals = [sum(sizes) for sizes in zip(*(trace["x"] for trace in device["data"]), strict=True)]
    assert totals == pytest.approx([50.0, 42.0, 34.0, 26.0])
    assert [trace["name"] for trace in host["data"]] == ["calibration activations"]
    assert [trace["y"] for trace in drift["data"]] == [pytest.approx([10 / i, 20 / i]) for i in (2, 3, 4, 5)]
    assert [(one["x"], one["y"]) for one in loss["data"]] == [([9, 19], [0.5, 0.3]), ([15], [0.4])]
    assert (tuning["data"][0]["x"], tuning["data"][0]["y"]) == ([1e-3, 2e-3, 4e-3], [12.5, 12.0, 12.2])
    assert {tuple(trace["y"]) for trace in windows["data"]} == {(0.3, 0.2), (0.1, 0.1)}
    assert density["data"][0]["z"] == [pytest.approx([40, 50])] * 2
    assert sorted(trace["x"][0] for trace in phases[0]["data"]) == [1.0, 1.0]


def test_the_headline_is_computed_with_its_uncertainty(page: tuple[Path, dict[str, Any]]) -> None:
    text = page[0].read_text()
    first, second, third = re.findall(r"<p>(.*?)</p>", text.partition('class="headline"')[2])[:3]
    best = expected(page[1]["cells"], "block", "perplexity")
    assert first.startswith(f"Of 4 recoveries block is best with a test perplexity of {best:.2f} (±")
    losses = {
        (cell["label"], cell["seed"]): [loss / 15 for loss in cell["losses"]["model"]]
        for cell in page[1]["cells"]
        if cell["status"] == "ok"
    }
    apart = [fmean(losses["submodule", seed][i] - losses["block", seed][i] for seed in (0, 1)) for i in range(40)]
    error = math.sqrt(sum((one - fmean(apart)) ** 2 for one in apart)) / 40
    assert f"Submodule is {fmean(apart):.4f} ± {error:.4f} nats per token behind it on the same 40" in second
    assert "with 0.81 of its peak device memory, live tensors (34.5 and 42.5 MiB)" in second
    assert third.startswith("Block is 0.0")


def test_rows_within_their_error_are_not_told_apart_and_single_runs_have_a_page(tmp_path: Path) -> None:
    alike = Results([row("submodule", 0.0), row("block", 0.0)])
    assert "is not told apart from it: " in page_of(alike, tmp_path / "page.html")
    report("submodule", run_dir=str(tmp_path)).save(tmp_path / "report.json")
    assert main(["report", str(tmp_path), "--html"]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "Recovery at the scope submodule ends with a test perplexity of 12.00, against 10.00 dense" in text
    assert "No recovery of this group was measured" in page_of(Results([report("dense")]), tmp_path / "page.html")


def test_nothing_is_loaded_from_elsewhere(page: tuple[Path, dict[str, Any]]) -> None:
    own = page[0].read_text().partition("<script>/**")[0]
    assert not re.search(r"https?://", own)
    assert Table(own).links == ["block-0/report.json"]
    assert "model: &lt;block&gt;" in own


def test_a_long_curve_is_thinned_and_keeps_its_end(tmp_path: Path) -> None:
    lines = [f"{step},{step / 2}" for step in range(5 * MOST + 3)]
    (tmp_path / "metrics.csv").write_text("\n".join(["step,loss", *lines]))
    (curve,) = read_curves(tmp_path).values()
    assert len(curve.steps) <= MOST
    assert (curve.steps[-1], curve.values[-1]) == (5 * MOST + 2, (5 * MOST + 2) / 2)
    assert read_curves(tmp_path / "nothing") == {}


# --- in a browser


def test_in_a_browser(page: tuple[Path, dict[str, Any]]) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    browser = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as running:
        window = running.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for width, scheme in ((1400, "light"), (400, "dark")):
            context = window.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
            look_at(context.new_page(), page[0].as_uri(), scheme)
            context.close()
        window.close()


def look_at(tab: Any, address: str, scheme: str) -> None:
    """The page draws its charts in the theme, fits the width, sorts, and tells of a point under the pointer."""
    faults = []
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    tab.goto(address)
    tab.wait_for_selector("html[data-drawn]")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.evaluate("document.querySelectorAll('.chart .main-svg').length") >= 10
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert dark == (scheme == "dark")
    labels = "[...document.querySelectorAll('table.results tbody tr')].map(row => row.dataset.label)"
    for expected_last in ("pruned", "dense"):
        tab.click("table.results th:nth-child(2) button")
        assert [one for one in tab.evaluate(labels) if "x9" not in one][-1] == expected_last
    tab.locator(".chart .points path").nth(0).hover(force=True)
    tab.wait_for_selector(".hoverlayer text")
    assert "perplexity" in tab.text_content(".hoverlayer")
    assert faults == []


def test_a_page_that_cannot_be_written_fails_no_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert draw_page(Results([report("block")]), tmp_path) == [tmp_path / "page.html"]
    monkeypatch.setattr("recon.report.page.build.page_of", lambda *_: 1 / 0)
    assert draw_page(Results([report("block")]), tmp_path) == []
    assert "could not write the page (division by zero); `recon report" in caplog.text
    with pytest.raises(ZeroDivisionError):
        write_page(Results([]), tmp_path / "page.html")
