"""Results, tables, plot and files."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from rich.console import Console

from grm_jax.benchmarks import preferences
from grm_jax.data.rows import DataError
from grm_jax.scoring import report
from grm_jax.scoring.aggregate import aggregate
from grm_jax.scoring.assess import assess, compare
from grm_jax.scoring.results import read_results, write_results
from grm_jax.scoring.statistics import Difference, Interval


@pytest.fixture
def records(record):
    return [record(f"r{i}", domain="even" if i % 2 == 0 else "odd") for i in range(40)]


@pytest.fixture
def rows(records, row):
    """Greedy is right on 3 of 4; samples likewise, the votes better; one record fails wholly."""
    made = []
    for i, one in enumerate(records):
        for sample in range(-1, 8):
            right = (i + sample) % 4 != 0
            scores = None if i == 7 else ([8, 3] if right else [4, 5])
            made.append(row(one.id, sample, scores, meta=float(right), tokens=30))
    return made


@pytest.fixture
def results(records, rows):
    return assess(preferences.BENCHMARK, records, rows, judge="mine", resamples=200)


def test_figures_are_those_of_the_benchmark(records, rows, results):
    # Every fourth greedy verdict is wrong (10 of 40), and record 7, right otherwise, has none.
    assert results.headline == ("overall", "accuracy")
    greedy = results.figure("greedy")
    assert greedy is not None
    assert greedy.value == pytest.approx(29 / 40)
    assert greedy.low < greedy.value < greedy.high
    assert results.figure("vote@8").value == pytest.approx(39 / 40)
    assert results.figure("vote@3") is None
    assert results.unjudged == ("r7",)
    assert results.rates["sampled"].failures == {"no_box": 1 / 40}
    assert [method.name for method in results.methods] == [
        *("greedy", "sample@1", "vote@2", "vote@4", "vote@8", "meta@2", "meta@4", "meta@8"),
        "adaptive@8",
    ]
    pairs = [(pair.first, pair.second) for pair in results.comparisons]
    assert pairs[:2] == [("vote@8", "sample@1"), ("vote@8", "greedy")]
    assert ("meta@2", "vote@2") in pairs and ("adaptive@8", "vote@8") in pairs
    assert results.comparisons[1].difference.value == pytest.approx(10 / 40)
    assert results.versions["grm_jax"]


def test_comparisons_are_paired(records, rows, results):
    found = aggregate(records, rows)
    for pair in results.comparisons:
        credits = [found.method(name).credits(records) for name in (pair.first, pair.second)]
        assert pair.difference == compare(
            preferences.BENCHMARK, records, credits[0], credits[1], resamples=200
        )


def test_compare_two_judges(records):
    ones, none = {r.id: 1.0 for r in records}, {r.id: 0.0 for r in records}
    found = compare(preferences.BENCHMARK, records, ones, none)
    assert (found.value, found.low, found.high) == (1, 1, 1)


def test_results_read_back(tmp_path, results):
    write_results(tmp_path / "results.json", results)
    assert read_results(tmp_path / "results.json") == results
    marked = tmp_path / "marked.json"  # a byte order mark, as some editors write it
    marked.write_bytes(b"\xef\xbb\xbf" + (tmp_path / "results.json").read_bytes())
    assert read_results(marked) == results
    with pytest.raises(DataError, match=r"gone\.json: no such file"):
        read_results(tmp_path / "gone.json")
    for text in ("{}", "[]", "{", '{"methods": 3}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(DataError, match=r"other\.json: not a results\.json"):
            read_results(tmp_path / "other.json")


def test_cells():
    assert report.cell(Interval(0.86, 0.8471, 0.8719)) == "86.0 [84.7, 87.2]"
    assert report.signed(Difference(0.032, -0.001, 0.041, 0.0004)) == "+3.2 [-0.1, +4.1], p < 0.001"
    assert report.signed(Difference(-0.01, -0.02, 0.0, 0.04)) == "-1.0 [-2.0, +0.0], p = 0.040"
    assert [report.percent(x) for x in (0, 0.0001, 0.123, 1)] == [
        "0.0%",
        "<0.1%",
        "12.3%",
        "100.0%",
    ]


def test_methods_table(results):
    grid = report.methods_grid(results)
    assert grid.columns == (
        *("method", "accuracy", "even", "odd"),
        *("samples", "ties", "unjudged", "unparsed", "cut off"),
    )
    assert grid.rows[0][0] == "greedy"
    assert grid.rows[0][1].startswith("72.5 [")
    assert grid.rows[0][-5:] == ("1", "0.0%", "2.5%", "2.5%", "0.0%")
    out = io.StringIO()
    report.print_results(results, console=Console(file=out, width=160))
    text = out.getvalue()
    assert "72.5 [" in text  # the bracket is no markup
    assert "unjudged: 1 of 40 records have no usable sample: r7" in text
    assert "sampled: 320 samples, 2.5% without scores (no_box 2.5%), 0.0% cut off" in text
    assert "vote@8 - greedy: +25.0 [" in text
    assert "untrained" not in text


def test_a_narrow_terminal_stacks_the_cells(results):
    out = io.StringIO()
    report.print_grid(report.methods_grid(results), console=Console(file=out, width=76))
    line = next(line for line in out.getvalue().splitlines() if "greedy" in line)
    assert "72.5" in line
    assert "[" not in line
    assert all(len(line) <= 76 for line in out.getvalue().splitlines())


def test_what_a_reader_must_know_is_said(results):
    changed = dataclasses.replace(
        results, model={"trained": False}, notes=("5 of 9 records",), skipped=("f:1: bad", "f:2: b")
    )
    lines = report.summary(changed)
    assert "note: 5 of 9 records" in lines
    assert any("untrained" in line and "mean nothing" in line for line in lines)
    assert "left out: 2 rows; the first: f:1: bad" in lines


def test_comparison_table(results):
    scalar = dataclasses.replace(results, methods=results.methods[:1])
    grid = report.comparison_grid({"RL": results, "scalar baseline": scalar})
    # 16 and 32 samples were never drawn: no such columns.
    assert grid.columns == ("model", "greedy", "sample@1", "vote@4", "vote@8", "meta@8")
    assert grid.rows[1][0] == "scalar baseline"
    assert grid.rows[1][1] == grid.rows[0][1]
    assert grid.rows[1][2:] == ("-",) * 4
    by_section = report.comparison_grid({"RL": results}, figure=("sections", "even"))
    assert by_section.title == "preferences, sections even, 40 records"
    assert by_section.rows[0][1] != grid.rows[0][1]
    other = dataclasses.replace(results, records=39)
    with pytest.raises(ValueError, match=r"39 records\), .*40 records\) do not compare"):
        report.comparison_grid({"RL": results, "RFT": other})
    with pytest.raises(ValueError, match="no results"):
        report.comparison_grid({})


def test_markdown():
    grid = report.Grid("title", ("model", "greedy"), (("a|b", "1.0 [0.5, 1.5]"),))
    assert grid.markdown() == (
        "title\n\n| model | greedy |\n| :--- | ---: |\n| a\\|b | 1.0 [0.5, 1.5] |\n"
    )


def test_names_are_no_markup():
    out = io.StringIO()
    grid = report.Grid("[bold]title", ("model", "[red]k"), (("[link]me", "1.0 [0.5, 1.5]"),))
    report.print_grid(grid, console=Console(file=out, width=80))
    for words in ("[bold]title", "[red]k", "[link]me", "1.0 [0.5, 1.5]"):
        assert words in out.getvalue()


def test_report_files(tmp_path, results):
    baselines = {"scalar baseline": Interval(0.8, 0.7, 0.9)}
    files = report.write_report(tmp_path / "out", results, baselines=baselines)
    assert [file.name for file in files] == [
        *("results.json", "table.md", "accuracy.png", "accuracy.svg")
    ]
    assert all(file.stat().st_size for file in files)
    assert files[2].read_bytes()[:4] == b"\x89PNG"
    svg = files[3].read_text(encoding="utf-8")
    for words in ("guided by the meta RM", "scalar baseline", "greedy", "k, samples per verdict"):
        assert words in svg
    assert json.loads(files[0].read_text())["headline"] == ["overall", "accuracy"]
    again = report.plot_accuracy(results, tmp_path / "again", baselines=baselines)
    assert again[1].read_bytes() == files[3].read_bytes()


def test_no_samples_no_plot(tmp_path, results):
    greedy = dataclasses.replace(results, methods=results.methods[:1])
    files = report.write_report(tmp_path, greedy)
    assert [file.name for file in files] == ["results.json", "table.md"]
    with pytest.raises(ValueError, match="nothing to plot"):
        report.plot_accuracy(greedy, tmp_path / "x")


def test_critiques_that_do_not_end_name_what_was_waited_for(results):
    rates = {name: dataclasses.replace(r, truncated=0.51) for name, r in results.rates.items()}
    cut = dataclasses.replace(results, rates=rates, model={"stops": {"<eos>": 1, "<end>": 107}})
    (line,) = {line for line in report.summary(cut) if "did not end" in line}
    assert "none of <eos> (id 1), <end> (id 107) came within" in line
    assert "--max-new-tokens" in line and "eos_token_id" in line
    few = dataclasses.replace(
        cut, rates={n: dataclasses.replace(r, truncated=0.5) for n, r in rates.items()}
    )
    assert not any("did not end" in line for line in report.summary(few))
