"""One query from Python: what `Judge.score` makes of k critiques."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import grm_jax
from grm_jax.checkpoint import load_arrays  # noqa: F401  (orbax is read once, not in a test)
from grm_jax.errors import UserError
from grm_jax.judge import judge as judging
from grm_jax.judge.judge import Judge
from grm_jax.judge.verdict import Verdict
from grm_jax.model.storage import load_model


@pytest.fixture(scope="module")
def judge(folder, one_device) -> Judge:
    return Judge.load(folder, mesh=one_device)


def test_a_judge_holds_its_weights_once(folder, templates, engine, one_device, monkeypatch):
    """Those that it reads are its own; those that it is given are not."""
    import jax

    loaded, load = [], judging.load_params
    monkeypatch.setattr(
        judging, "load_params", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1]
    )
    judge = Judge.load(folder, mesh=one_device)
    weights = judge.params
    ((_, read),) = loaded
    left = {"embed": read.pop("embed"), "final_norm": read.pop("final_norm")}
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(read))
    assert all(weights[name] is leaf for name, leaf in left.items()), "as decoding wants them"
    assert judge.params is weights and len(loaded) == 1
    _, given = load_model(folder)
    judge = Judge(
        judge.model, given, judge.tokenizer, one_device, templates=templates, engine=engine
    )
    assert judge.params is given
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given))


def test_a_real_model_answers_and_repeats_itself(judge):
    turns = ({"role": "user", "content": " sum 1 2"}, {"role": "assistant", "content": " 3"},
             {"role": "user", "content": " cat"})  # fmt: skip
    first = judge.score(turns, [" anna", " ben"], k=4)
    assert isinstance(first, Verdict) and len(first.critiques) == 4
    assert first == judge.score(turns, [" anna", " ben"], k=4)
    other = judge.score(turns, [" anna", " ben"], k=4, seed=1)
    assert [row.text for row in other.critiques] != [row.text for row in first.critiques]
    single = judge.score(" sum 1 2", [" anna"], k=2)
    assert {len(critique.order) for critique in single.critiques} == {1}
    # Random weights write no scores: a named failure, and no number.
    assert first.failure in first.failures and first.scores == () and first.winner is None
    assert sum(first.failures.values()) == 4 and first.usage.samples == 4
    assert first.usage.sampled_tokens == sum(row.tokens for row in first.critiques) > 0
    assert len(first.judge) == 16 and first.judge == judge.fingerprint


def test_many_requests_are_one_batch_and_streamed_as_they_end(judge):
    asked = [
        {"query": " sum 1 2", "responses": [" anna"] * n, "k": k, "seed": seed}
        for n, k, seed in [(1, 1, 0), (2, 3, 0), (3, 2, 5), (2, 3, 0)]
    ]
    verdicts = judge.score_many(asked)
    assert [len(verdict.critiques) for verdict in verdicts] == [1, 3, 2, 3]
    assert verdicts[1] == verdicts[3], "equal requests have equal answers"
    for request, verdict in zip(asked, verdicts, strict=True):
        alone = judge.score(**request)
        assert [row.text for row in alone.critiques] == [row.text for row in verdict.critiques]
    assert sorted(index for index, _ in judge.stream(asked)) == [0, 1, 2, 3]
    assert judge.score_many([]) == []
    with pytest.raises(UserError, match=r"requests\[1\]: unknown field 'respones'"):
        judge.score_many([asked[0], {"query": "a", "respones": ["b"]}])


def test_a_session_is_planned_for_its_requests(judge):
    """As `Sampler.sample` plans: few critiques of each request are of many prompts."""
    responses = [" anna", " ben"]
    few = [{"query": f" sum 1 {i}", "responses": responses, "k": 2} for i in range(8)]
    judge._session = None
    judge.score_many(few)
    of_few = judge._session
    assert of_few is not None
    shape = of_few.plan.shape
    assert (shape.lanes, shape.readers) == (16, 1), "two critiques, each of another order"
    judge.score_many(few[:4])
    assert judge._session is of_few, "fewer requests have room"
    judge.score(" sum 1 2", responses, k=7)
    of_many = judge._session
    assert of_many is not None and of_many.plan.shape.readers >= 4 and of_many is not of_few


def test_two_kinds_of_calls_share_a_session_that_covers_both(judge):
    responses = [" anna", " ben"]
    judge._session = None
    judge.score(" sum 1 2", responses, k=1, order="given")
    narrow = judge._session
    judge.score(" sum 1 2", responses, k=2, order="given")
    both = judge._session
    assert narrow is not None and both is not None and both is not narrow
    assert both.plan.shape.readers == 2
    for k in (1, 2, 1):
        judge.score(" sum 1 2", responses, k=k, order="given")
        assert judge._session is both
    judge.score(" sum 1 2", responses, k=1, expected=False)
    assert judge._session is both


def test_a_short_critique_of_a_long_prompt_after_a_long_critique(judge):
    """Each fits the positions by itself; the longest prompt and the longest critique do not."""
    judge._session = None
    judge.score(" sum 1 2", [" anna", " ben"], k=1, max_new_tokens=40)
    long = judge.score(" sum 1 2", [" anna" * 18, " ben"], k=1, max_new_tokens=4)
    assert long.usage.prompt_tokens > judge.model.max_position - 40


def test_what_can_not_be_judged_is_refused(judge):
    with pytest.raises(UserError, match=r"the prompt has .* tokens, and 52 leave room"):
        judge.score(" sum 1 2", [" anna" * 60, " ben"])
    with pytest.raises(UserError, match="responses"):
        judge.score(" sum 1 2", [])
    with pytest.raises(UserError, match="principles"):
        judge.score(" sum 1 2", [" anna"], principles=[])


def test_the_package_shows_the_judge_and_imports_nothing_for_it():
    assert grm_jax.Judge is Judge
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = grm_jax.Nothing
    program = "import sys, grm_jax; assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


ROOT = Path(__file__).parents[2]


def test_the_example_of_the_packages_readme(folder, tmp_path):
    text = (ROOT / "grm_jax/judge/README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "lines.py").write_text(lines.replace("runs/tiny", str(folder)))
    names = runpy.run_path(str(tmp_path / "lines.py"))
    assert len(names["verdict"].critiques) == 8 and names["verdict"].seed == 1
    assert [len(verdict.critiques) for verdict in names["verdicts"]] == [4, 4, 4]


def test_the_five_lines_of_the_readme(folder, tmp_path, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(from grm_jax import Judge\n.*?)```", text, re.DOTALL)
    assert len([line for line in lines.splitlines() if line]) == 5
    (tmp_path / "lines.py").write_text(lines.replace("runs/tiny", str(folder)))
    runpy.run_path(str(tmp_path / "lines.py"))
    shown = capsys.readouterr().out
    assert shown.startswith("() None ")  # random weights write no scores
