"""`python -m grm_jax.judge`: rows in, verdicts out, line by line."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from grm_jax.critique.parse import Parsed
from grm_jax.judge import __main__ as command
from grm_jax.judge import score_file
from grm_jax.judge.judge import Judge


@pytest.fixture
def readable(monkeypatch):
    """Critiques whose scores follow from their texts; one in six can not be read."""

    def read(template, text, n, truncated):
        mark = sum(map(ord, text))
        if mark % 6 == 0:
            return Parsed(None, "no_box", "", "")
        return Parsed(tuple(float(1 + (mark + i) % 10) for i in range(n)), None, "", "")

    monkeypatch.setattr("grm_jax.judge.critiques.read", read)


@pytest.fixture
def rows(tmp_path):
    """One row of each of several shapes, without labels where a shape has them."""
    made = [
        {"query": " sum 1 2", "responses": [" anna", " ben"]},
        {"id": "b", "prompt": " sum 1 2", "chosen": " anna", "rejected": " carl"},
        {"prompt": [{"role": "user", "content": " cat"}], "response": " ben"},
        {"turns": [{"role": "user", "content": " dog"}], "extra": 3,
         "responses": [[{"role": "assistant", "content": " anna"}], " ben", " carl"]},
        {"query": " sum 2 2", "responses": [" ben"], "labels": [1], "criteria": " polite"},
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def run(*arguments) -> Any:
    with pytest.raises(SystemExit) as exit:
        command.main([str(argument) for argument in arguments])
    return 0 if exit.value.code is None else exit.value.code


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_row_gets_a_verdict_in_its_place(folder, rows, tmp_path, readable, capsys):
    output, page = tmp_path / "out" / "scored.jsonl", tmp_path / "page.html"
    status = run("--model", folder, "--input", rows, "--output", output, "-k", 3, "--html", page)
    asked, scored = read_lines(rows), read_lines(output)
    assert [{k: v for k, v in row.items() if k != "verdict"} for row in scored] == asked
    judge = Judge.load(folder)
    assert [len(row["verdict"]["critiques"]) for row in scored] == [3] * 5
    for row, n in zip(scored, (2, 2, 1, 3, 1), strict=True):
        verdict = row["verdict"]
        assert len(verdict["scores"]) == (0 if verdict["failure"] else n)
        assert verdict["judge"] == judge.fingerprint
    alone = judge.score(" sum 1 2", [" anna", " ben"], k=3)
    assert [c["critique"] for c in scored[0]["verdict"]["critiques"]] == [
        row.text for row in alone.critiques
    ]
    failed = [row for row in scored if row["verdict"]["failure"]]
    assert status == (command.FAILED if failed else 0)
    assert f"{5 - len(failed)} of 5 rows have scores" in capsys.readouterr().out
    assert "Verdicts of" in page.read_text() and "critique 0" in page.read_text()


def test_a_run_that_was_stopped_goes_on(folder, rows, tmp_path, readable, monkeypatch):
    output = tmp_path / "scored.jsonl"
    arguments = ("--model", folder, "--input", rows, "--output", output, "-k", 2)
    run(*arguments)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    asked = []
    stream = Judge.stream
    monkeypatch.setattr(
        Judge,
        "stream",
        lambda self, requests: asked.append(len(requests)) or stream(self, requests),
    )
    for kept in (b"".join(lines[:2]), b"".join(lines[:2]) + lines[2][:40], whole):
        output.write_bytes(kept)
        asked.clear()
        run(*arguments)
        again = [{**row, "verdict": {**row["verdict"], "seconds": 0}} for row in read_lines(output)]
        first = [json.loads(line) for line in lines]
        assert again == [{**r, "verdict": {**r["verdict"], "seconds": 0}} for r in first]
        assert asked == ([3] if kept != whole else [])


def test_other_options_do_not_go_on_with_a_file(folder, rows, tmp_path, readable):
    output = tmp_path / "scored.jsonl"
    arguments = ["--model", folder, "--input", rows, "--output", output]
    run(*arguments, "-k", 2)
    before = output.read_bytes()
    message = run(*arguments, "-k", 3)
    assert "scored.jsonl:1: it is of another row, other options or another judge" in message
    assert output.read_bytes() == before
    output.write_text('{"no": "verdict"}\n')
    assert "scored.jsonl:1: no verdict" in run(*arguments, "-k", 2)


def test_a_bad_row_stops_before_anything_is_sampled_or_is_named(
    folder, rows, tmp_path, readable, monkeypatch
):
    with rows.open("a") as file:
        file.write('{"query": " sum 1 2"}\n')
        file.write('{"query": "%s", "responses": [" anna"]}\n' % (" sum" * 99))
    output = tmp_path / "scored.jsonl"
    arguments = ["--model", folder, "--input", rows, "--output", output, "-k", 1]
    stream = Judge.stream
    monkeypatch.setattr(Judge, "stream", lambda *_: pytest.fail("sampled"))
    assert "rows.jsonl:6: responses: no known shape" in run(*arguments)
    assert not output.exists()
    monkeypatch.setattr(Judge, "stream", stream)
    assert run(*arguments, "--skip-bad-rows") == command.FAILED
    scored = read_lines(output)
    assert [row["verdict"]["failure"] for row in scored[5:]] == [score_file.BAD_ROW] * 2
    assert "rows.jsonl:7: the prompt has" in scored[6]["verdict"]["error"]


def test_one_query_from_the_command_line(folder, tmp_path, readable, capsys):
    output = tmp_path / "one.jsonl"
    status = run("--model", folder, "--query", " sum 1 2", "--response", " anna",
                 "--response", " ben", "-k", 2, "--seed", 3, "--output", output)  # fmt: skip
    shown = capsys.readouterr().out
    (row,) = read_lines(output)
    assert status == (command.FAILED if row["verdict"]["failure"] else 0)
    assert shown.count("--- critique") == 2 and row["responses"] == [" anna", " ben"]
    assert row["verdict"]["seed"] == 3


def test_rows_from_standard_input(folder, rows, tmp_path, readable, monkeypatch):
    output = tmp_path / "scored.jsonl"
    with rows.open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        run("--model", folder, "--input", "-", "--output", output, "-k", 1)
    assert len(read_lines(output)) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --input (a file of rows) or --query"),
        (["--input", "a", "--query", "b"], "one of both"),
        (["--query", "a"], "at least one --response"),
        (["--input", "a"], "give --output"),
        (["--input", "a", "--response", "b", "--output", "c"], "rows have their own"),
        (["--query", "a", "--response", "b", "--html", "."], "a directory"),
    ],
)
def test_arguments_that_say_nothing_or_too_much(arguments, message):
    assert message in run("--model", "none", *arguments)


def test_help_needs_no_jax():
    program = (
        "import sys\nfrom grm_jax.judge import __main__ as command\n"
        "try: command.main(['--help'])\nexcept SystemExit: assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
