"""The report: one file, nothing from outside in it, every text escaped."""

from __future__ import annotations

import dataclasses
import html
import html.parser
import json
import re
import shutil
import subprocess

import pytest

from grm_jax.benchmarks import preferences, realmistake
from grm_jax.scoring.aggregate import aggregate
from grm_jax.scoring.assess import assess
from grm_jax.scoring.html import Evaluated, write_html

EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)>\u2028&lt;'


@pytest.fixture
def evaluated(record, row):
    records = [
        dataclasses.replace(record(f"r{i}", domain=f"part {i % 2}"), responses=(EVIL, "plain"))
        for i in range(12)
    ]
    rows = [
        row(
            one.id,
            sample,
            None if i == 3 else ([5, 5] if i == 4 else [9, 1] if i % 2 else [1, 9]),
            text=f"Specific Criteria: {EVIL}\nAnalysis: because\nScores: \\boxed{{9, 1}}",
            meta=0.5,
        )
        for i, one in enumerate(records)
        for sample in range(-1, 4)
    ]
    results = assess(preferences.BENCHMARK, records, rows, judge=f"judge {EVIL}", resamples=100)
    (method,) = [m for m in aggregate(records, rows).methods if m.name == "vote@4"]
    return Evaluated(preferences.BENCHMARK, results, records, rows, method)


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data


def parsed(path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def test_it_is_one_file_that_asks_nobody(tmp_path, evaluated):
    page = parsed(write_html(tmp_path / "report.html", [evaluated], title=EVIL))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    outside = [
        (tag, name, value)
        for tag, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href") and not (value or "").startswith("#")
    ]
    assert outside == []
    assert "img" not in {tag for tag, _ in page.tags}
    assert len(page.scripts) == 2  # the data and the browser


def test_data_come_back_wrong_ones_first(tmp_path, evaluated):
    page = parsed(write_html(tmp_path / "report.html", [evaluated], title="t"))
    ((bench),) = (json.loads(page.scripts[0]),)
    records = bench[0]["records"]
    verdicts = [one["verdict"] for one in records]
    assert verdicts == ["wrong"] * 5 + ["unjudged"] + ["tie"] + ["right"] * 5
    assert records[0]["responses"] == [EVIL, "plain"] and records[0]["best"] == [0]
    sample = records[0]["samples"][0]
    assert sample["index"] == -1 and sample["meta"] == 0.5 and sample["scores"] == [1, 9]
    assert EVIL in sample["text"]
    assert records[0]["totals"] == [1, 9] and records[0]["used"] == "vote@4"


def test_records_without_room_are_left_out_and_said_so(tmp_path, evaluated):
    path = write_html(tmp_path / "report.html", [evaluated], title="t", characters=4000)
    (bench,) = json.loads(parsed(path).scripts[0])
    assert 0 < len(bench["records"]) < bench["of"] == 12
    assert {one["verdict"] for one in bench["records"]} == {"wrong"}
    assert "the others stand in samples.jsonl" in path.read_text()


def test_private_rows_are_not_in_it(tmp_path, evaluated):
    records = [dataclasses.replace(r, responses=("SECRET",), labels=(1.0,)) for r in
               evaluated.records]  # fmt: skip
    rows = [
        dataclasses.replace(row, scores=(7.0,), order=(0,), failure=None, text="SECRET")
        for row in evaluated.rows
    ]
    results = dataclasses.replace(evaluated.results, benchmark="realmistake")
    method = aggregate(records, rows).methods[-1]
    one = Evaluated(realmistake.BENCHMARK, results, records, rows, method)
    text = write_html(tmp_path / "report.html", [one], title="t").read_text()
    assert "SECRET" not in text and "query r1" not in text
    assert "are not published" in text
    (bench,) = json.loads(parsed(tmp_path / "report.html").scripts[0])
    assert {one["verdict"] for one in bench["records"]} == {"rated"}


def test_figures_stand_in_it(tmp_path, evaluated):
    results = evaluated.results
    text = write_html(tmp_path / "report.html", [evaluated], title="t").read_text()
    value = results.figure("vote@4")
    assert f"{100 * value.value:.1f}" in text and "<svg" in text
    assert "rules: ties random, unparsed wrong" in text
    assert re.search(r"<th>unparsed</th>", text)
    assert "Random weights" not in text
    untrained = dataclasses.replace(results, model={"trained": False})
    again = dataclasses.replace(evaluated, results=untrained)
    text = write_html(tmp_path / "b.html", [again], title="t").read_text()
    assert "Random weights: these figures mean nothing" in text


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
def test_it_works_in_a_browser(tmp_path, evaluated):
    path = write_html(tmp_path / "report.html", [evaluated, evaluated], title=EVIL)
    # The page as it stands after its script ran; a script of a text would have changed the title.
    text = path.read_text().replace("show(0);\n", SCRIPTED)
    path.write_text(text)
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom",
        path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found is not None, done.stdout[-2000:]
    assert html.unescape(found[1]) == "12 of 12|right 5 of 12|found 12|none Nothing fits.|tab 12"


# Chooses a verdict, searches, and opens the second tab, as a reader would.
SCRIPTED = """show(0);
const said = [];
const [input, verdict] = panels[0].querySelectorAll(".filters input, .filters select");
const count = () => panels[0].querySelector(".count").textContent;
said.push(count());
verdict.value = "right"; verdict.dispatchEvent(new Event("input"));
said.push("right " + count());
verdict.value = ""; input.value = "onerror"; input.dispatchEvent(new Event("input"));
said.push("found " + panels[0].querySelectorAll(".list button").length);
if (document.querySelectorAll("article img, article script").length) said.push("INJECTED");
input.value = "no such words"; input.dispatchEvent(new Event("input"));
said.push("none " + panels[0].querySelector("article").textContent);
tabs[1].click();
said.push("tab " + panels[1].querySelectorAll(".list button").length);
document.body.dataset.found = said.join("|");
"""
