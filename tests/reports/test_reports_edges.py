"""Files that users gave to train and evaluate, through the commands: right, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from grm_jax import evaluate, train
from grm_jax.critique import Template
from grm_jax.data.preferences import read_preferences
from grm_jax.data.targets import read_targets
from grm_jax.data.trajectories import Instruction
from grm_jax.scoring.items import BenchmarkRecords
from grm_jax.scoring.long_prompts import fit
from grm_jax.scoring.results import read_results
from grm_jax.tokenizer.folding import fold

INPUTS = Path(__file__).parent / "inputs"
SMALL = {"cold-start": 20, "train": 8, "fresh": 4, "shifted": 4}
WORLD = [f"--world.{name}={count}" for name, count in SMALL.items()]


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """(recipe, arguments) -> (exit code, what was printed) of the training command."""
    monkeypatch.setattr(train, "setup_devices", lambda count: None)  # the suite has its devices

    def run(recipe: str, *args: str | Path) -> tuple[int, str]:
        given = ["--config", recipe, "--run-dir", tmp_path / "run", "--distributed", "off", *WORLD]
        code = train.main([str(arg) for arg in (*given, *args)])
        out = capsys.readouterr()
        return code, out.out + out.err

    return run


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("08_no_box_at_all", (":1: critique: holds no \\boxed", "8 of 8 rows are bad (8 no_box)")),
        ("08_scores_contradict", (":1: scores: [9, 2], but the critique says \\boxed{8, 9}",)),
        ("08_single_backslash", (":1: critique: U+0008 stands before 'oxed'", "`\\\\boxed`")),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_critiques_that_teach_nothing_are_refused(command, tmp_path, name, words, skip):
    more = ["--skip-bad-rows"] if skip else []
    code, out = command("sft.py", "--instructions", INPUTS / f"{name}.jsonl", *more)
    assert code == 1
    for word in words:
        assert word in out
    assert ("more than 10%" if skip else "--skip-bad-rows leaves them out") in out
    assert not (tmp_path / "run" / "sft").exists()


@pytest.mark.parametrize(
    ("name", "roles", "last"),
    [
        ("02_instruction_tool_call", ["user", "assistant"], '[tool call] {"id": "1"}'),
        ("93_instructions_system", ["user", "assistant"], "Hello"),
        ("05_bom_trajectories", None, "Scores: \\boxed{8, 9}"),
    ],
)
def test_instructions_as_people_have_them_are_read(name, roles, last):
    many, single = Template.load("grm"), Template.load("single")
    found = read_targets(INPUTS / f"{name}.jsonl", many=many, single=single)
    assert len(found.rows) == 2 and not found.skipped
    row = found.rows[0]
    if isinstance(row, Instruction):
        assert [turn["role"] for turn in row.messages] == roles
        assert row.messages[-1]["content"] == last
    else:
        assert row.text == last


def test_a_system_text_reaches_a_template_without_one():
    many, single = Template.load("grm"), Template.load("single")
    found = read_targets(INPUTS / "93_instructions_system.jsonl", many=many, single=single)
    system = found.rows[1]
    assert isinstance(system, Instruction)
    assert fold(system.messages) == [
        {"role": "user", "content": "Be brief\n\nHi"},
        {"role": "assistant", "content": "Hello"},
    ]


def test_records_of_one_prompt_have_no_interval(tmp_path, capsys):
    data, out = INPUTS / "90_one_prompt_only.jsonl", tmp_path / "out"
    args = ["--bench", "preferences", "--data", data, "--judge", "random", "-k", "8"]
    evaluate.main([str(arg) for arg in (*args, "--resamples", "50", "--output", out)])
    printed = capsys.readouterr().out
    assert "[< 5 prompts]" in printed and "p < 0.001" not in printed and "p = " not in printed
    assert "because they are based on fewer than 5 independent prompts" in printed
    assert "(no interval, no p-value: fewer than 5 independent prompts)" in printed
    results = read_results(out / "preferences" / "results.json")
    for method in results.methods:
        for group in method.figures.values():
            assert all(figure.bounds is None for figure in group.values())
    assert results.comparisons
    assert all(pair.difference.p_value is None for pair in results.comparisons)
    table = (out / "preferences" / "table.md").read_text()
    assert "[< 5 prompts]" in table.replace("\\", "") and "fewer than 5 independent" in table
    page = (out / "report.html").read_text()
    assert "fewer than 5 independent prompts" in page
    picture = (out / "preferences" / "accuracy.svg").read_text()
    assert "no intervals: fewer than 5 independent prompts" in picture
    # Another run of the same compares without a p-value, too.
    evaluate.main([str(arg) for arg in (*args, "--seed", "1", "--compare", out, "--output",
                                        tmp_path / "two", "--resamples", "50")])  # fmt: skip
    against = read_results(tmp_path / "two" / "preferences" / "results.json").against
    assert against and all(one.difference.bounds is None for one in against)


def test_pairs_that_become_one_text_when_cut_are_left_out():
    records = BenchmarkRecords(read_preferences(INPUTS / "03_differ_in_the_cut_part.jsonl"))

    def words(record) -> int:
        return sum(len(text.split()) for text in (record.query, *record.responses))

    assert len(records) == 7
    found = fit(records, words, 60, "truncate-middle")
    assert [record.responses for record in found] == [records[6].responses]
    assert found.notes == (
        "6 prompts longer than 60 tokens were cut in the middle",
        "6 items were left out: their responses differ only in what was cut",
    )
