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
from grm_jax.critique.template_set import TemplateConfig
from grm_jax.data.critiques import Critique
from grm_jax.data.preferences import Preference, write_preferences
from grm_jax.data.synthetic_files import build_tokenizer
from grm_jax.errors import UserError
from grm_jax.judge import judge as judging
from grm_jax.judge.about import About, JudgeDefaults
from grm_jax.judge.judge import Judge, Judgement, JudgeOptions
from grm_jax.model.params import init_params, param_table
from grm_jax.model.storage import load_model, save_model
from grm_jax.sampler.plan import EngineConfig

TEMPLATES = TemplateConfig("compact", "compact_single", "compact_meta")
ENGINE = EngineConfig(max_rows=16, page=16, prefill_tokens=64, chunk=8, min_lanes=8)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    import jax

    tokenizer = build_tokenizer()
    config = model.replace(vocab_size=tokenizer.vocab_size, max_position=64)
    root = tmp_path_factory.mktemp("judge") / "model"
    save_model(root, config, init_params(param_table(config), jax.random.key(0), "float32"))
    tokenizer.save(root)
    from grm_jax.critique.template_set import Templates

    About(
        templates=Templates.load(TEMPLATES), engine=ENGINE,
        judge=JudgeDefaults(temperature=1.0, max_new_tokens=12),
    ).write(root)  # fmt: skip
    return root


@pytest.fixture(scope="module")
def judge(folder, one_device) -> Judge:
    return Judge.load(folder, mesh=one_device)


def test_a_judge_holds_its_weights_once(folder, one_device, monkeypatch):
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
        judge.model, given, judge.tokenizer, one_device, templates=TEMPLATES, engine=ENGINE
    )
    assert judge.params is given
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given))


def row(sample: int, scores, order=(0, 1, 2), failure=None) -> Critique:
    return Critique("query", sample, order, scores, failure, "stop")


@pytest.fixture
def said(judge, monkeypatch):
    """Makes the judge give these rows."""

    def say(*rows):
        asked = []
        monkeypatch.setattr(
            judge, "sample", lambda records, options: asked.append((records, options)) or list(rows)
        )
        return asked

    return say


def test_scores_are_means_in_the_order_of_the_responses(judge, said):
    asked = said(row(0, (3.0, 9.0, 1.0)), row(1, (5.0, 8.0, 1.0), (2, 0, 1)))
    found = judge.score(" sum 1 2", [" anna", " ben", " carl"], k=2, options=JudgeOptions(seed=7))
    assert found.scores == (4.0, 8.5, 1.0) and found.best == 1 and found.failure is None
    assert found.verdict.totals == (8.0, 17.0, 2.0) and len(found.critiques) == 2
    (((record,), options),) = asked
    assert record.responses == (" anna", " ben", " carl") and record.query == " sum 1 2"
    assert (options.k, options.seed, options.greedy) == (2, 7, False)


def test_what_failed_is_no_score(judge, said):
    said(row(0, None, failure="no_box"), row(1, None, failure="truncated"),
         row(2, None, failure="no_box"))  # fmt: skip
    found = judge.score(" sum 1 2", [" anna", " ben", " carl"], k=3)
    assert found.scores == () and found.best is None and found.failure == "no_box"
    said(row(0, (5.0, 5.0, 1.0)), row(1, None, failure="no_box"))
    tied = judge.score(" sum 1 2", [" anna", " ben", " carl"], k=2)
    assert tied.best is None and tied.verdict.best == (0, 1) and tied.failure is None


def test_a_real_model_answers_and_repeats_itself(judge):
    turns = ({"role": "user", "content": " sum 1 2"}, {"role": "assistant", "content": " 3"},
             {"role": "user", "content": " cat"})  # fmt: skip
    first = judge.score(turns, [" anna", " ben"], k=4)
    assert isinstance(first, Judgement) and len(first.critiques) == 4
    assert first == judge.score(turns, [" anna", " ben"], k=4)
    # The same critiques as a record of a file would get.
    record = Preference("query", turns, (" anna", " ben"), (1.0, 0.0))
    assert judge.sample([record], JudgeOptions(k=4, greedy=False)) == list(first.critiques)
    single = judge.score(" sum 1 2", [" anna"], k=2)
    assert {len(critique.order) for critique in single.critiques} == {1}


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
    record = Preference("a", ({"role": "user", "content": " sum 1 2"},), (" 3", " 4"), (1.0, 0.0))
    write_preferences(tmp_path / "heldout.jsonl", [record])
    lines = lines.replace("runs/tiny/world", str(tmp_path)).replace("runs/tiny", str(folder))
    (tmp_path / "lines.py").write_text(lines)
    names = runpy.run_path(str(tmp_path / "lines.py"))
    assert len(names["verdict"].critiques) == 8
    assert [row.sample for row in names["critiques"]] == [-1, *range(8)]


def test_the_five_lines_of_the_readme(folder, tmp_path, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(from grm_jax import Judge\n.*?)```", text, re.DOTALL)
    assert len([line for line in lines.splitlines() if line]) == 5
    (tmp_path / "lines.py").write_text(lines.replace("runs/tiny", str(folder)))
    runpy.run_path(str(tmp_path / "lines.py"))
    shown = capsys.readouterr().out
    assert shown.startswith("() None ")  # random weights write no scores
