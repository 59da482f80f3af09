"""What the README files show works: their links, commands, rows and templates."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import tyro

from grm_jax import convert, evaluate_options, options, recipes, serve
from grm_jax.benchmarks import BENCHMARKS
from grm_jax.critique import BUILTIN, Template, parse, render
from grm_jax.data.preferences import parse_row
from grm_jax.data.trajectories import parse_trajectory
from grm_jax.judge import __main__ as judge_command
from grm_jax.train import split_option

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "grm_jax").glob("*/README.md"))]
COMMAND = re.compile(r"^python -m grm_jax\.(\w+)(.*)$", re.MULTILINE)


def blocks(language: str) -> list[tuple[Path, str]]:
    """(file, text) of every block of code in this language."""
    return [
        (file, text)
        for file in FILES
        for text in re.findall(rf"^```{language}\n(.*?)^```", file.read_text("utf-8"), re.M | re.S)
    ]


def commands() -> list[tuple[str, str]]:
    """(command, arguments) of every line that starts one of the package's commands."""
    found = []
    for _, text in blocks("bash"):
        found += COMMAND.findall(text.replace("\\\n", " "))
    return found


def test_the_top_file_and_those_of_the_packages_are_looked_at():
    names = {file.parent.name for file in FILES}
    assert {"benchmarks", "scoring", "data", "critique", "model", "judge"} <= names
    assert {"training", "planning"} <= names
    assert {name for name, _ in commands()} >= {"train", "evaluate", "convert", "plan", "serve"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    targets = re.findall(r"\]\(([^)\s]+)\)", file.read_text("utf-8"))
    local = [target for target in targets if "://" not in target]
    missing = [target for target in local if not (file.parent / target.split("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize("name, text", commands())
def test_commands_have_options_that_exist(name, text):
    args = shlex.split(text, comments=True)
    if name == "evaluate":
        evaluate_options.check(tyro.cli(evaluate_options.Arguments, args=args))
    elif name == "judge":
        judge_command.check(tyro.cli(judge_command.Arguments, args=args))
    elif name == "serve":
        serve.check(tyro.cli(serve.Arguments, args=args))
    elif name == "convert":
        tyro.cli(convert.Command, args=args)  # type: ignore[arg-type]
    else:
        spec, args = split_option(args, "--config")
        assert spec is not None, f"{name} without --config"
        if name == "plan":
            topology, args = split_option(args, "--topology")
            assert topology is not None
        recipe = recipes.load(spec)
        if args != ["--help"]:
            options.check(tyro.cli(type(recipe), default=recipe, args=args))


@pytest.mark.parametrize("text", [text for _, text in blocks("json")])
def test_rows_can_be_read(text):
    for line in text.splitlines():
        row = json.loads(line)
        if "critique" in row:
            trajectory = parse_trajectory(row, "README")
            # The example shortens the text before the box, and ends in a verdict.
            assert parse(trajectory.text, len(trajectory.responses)).failure is None
        elif "role" in str(row.get("messages")):
            parse_trajectory(row, "README")
        else:
            parse_row(row)


def test_the_template_guards_its_markers():
    ((_, text),) = blocks("jinja")
    template = Template.from_source(text, "README")
    ((prompt),) = render(template, "Is 7 prime?</query>", ["Yes.", "No."])
    assert prompt["content"].count("</query") == 1
    assert "[The Begin of Response 2]\nNo.\n" in prompt["content"]


def test_every_benchmark_and_template_has_its_row():
    benchmarks = (ROOT / "grm_jax/benchmarks/README.md").read_text("utf-8")
    assert all(benchmarks.count(f"\n| `{name}` |") == 2 for name in BENCHMARKS)
    critique = (ROOT / "grm_jax/critique/README.md").read_text("utf-8")
    assert all(f"`{name}`" in critique for name in BUILTIN)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_table_of_rules_says_what_the_code_does(name):
    text = (ROOT / "grm_jax/benchmarks/README.md").read_text("utf-8")
    row = re.findall(rf"^\| `{name}` \|(.*)\|$", text, re.MULTILINE)[1]
    _, ties, unparsable, order, form = (cell.strip() for cell in row.split("|"))
    rules, fixed = BENCHMARKS[name].authors, BENCHMARKS[name].fixed
    assert (unparsable, form) == (rules.unparsed, rules.form)
    assert ties == rules.ties or (ties in ("-", "a class") and "ties" in fixed)
    assert order == rules.order or (order == "-" and "order" in fixed)


def test_the_language_alone(tmp_path):
    """The example of the package without JAX, with a model that always says the same."""
    ((_, text),) = [one for one in blocks("python") if "from grm_jax.critique import" in one[1]]
    (tmp_path / "example.py").write_text(text, encoding="utf-8")
    said = "Specific Criteria: ..\nAnalysis: ..\nScores: \\boxed{9, 2}"
    names = runpy.run_path(str(tmp_path / "example.py"), {"my_model": lambda messages: said})
    # The first shown is always the better one, and each response is shown first in turn.
    assert names["verdict"].totals == (44.0, 44.0)
    assert names["reward"] in (-1.0, 1.0)
