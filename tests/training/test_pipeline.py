"""The whole pipeline with a micro model on four virtual devices, and resuming every stage of it.

Run as a script, `test_pipeline.py STAGE RUN_DIR [HOLD]`, it is one stage of that run, which waits
to be killed after step HOLD.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from grm_jax import recipes, stopping
from grm_jax.data.synthetic import WorldConfig
from grm_jax.data.trajectories import Trajectory, read_trajectories
from grm_jax.judge.critiques import Critic
from grm_jax.metrics import MetricsWriter, Progress
from grm_jax.model import storage
from grm_jax.model.config import SIZES, ModelConfig
from grm_jax.model.storage import load_model
from grm_jax.stopping import Stopped
from grm_jax.training import meta_rm, rft, scalar_rm
from grm_jax.training.final_evaluation import evaluate_pipeline
from grm_jax.training.meta_rm import run_meta_rm
from grm_jax.training.relabel import relabelled
from grm_jax.training.rft import run_rft
from grm_jax.training.rl import run_rl
from grm_jax.training.run import Run
from grm_jax.training.scalar_rm import run_scalar_rm
from grm_jax.training.setup import ConfigError, HeldOutConfig
from grm_jax.training.sft import run_sft

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("sft", "rft", "rl", "meta_rm", "scalar_rm")
STEPS = {"sft": 160, "rft": 6, "rl": 6, "meta_rm": 6, "scalar_rm": 6}
EVERY = 4  # steps between two checkpoints
MICRO = ModelConfig(
    num_layers=2,
    embed_dim=64,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    hidden_dim=128,
    query_pre_attn_scalar=32,
    sliding_window=16,
    max_position=512,
)


def make_recipe(run_dir: Path, heldout: HeldOutConfig = HeldOutConfig()) -> recipes.SPCTRecipe:
    """The embedded recipe, shrunk."""
    recipe = recipes.load("spct.py")
    assert isinstance(recipe, recipes.SPCTRecipe)
    change = dataclasses.replace

    def fitting(name: str, batch_size: int = 8) -> recipes.Fitting:
        return change(getattr(recipe, name).fitting, steps=STEPS[name], batch_size=batch_size)

    return change(
        recipe,
        setup=change(
            recipe.setup,
            run_dir=str(run_dir),
            size="micro",
            world=WorldConfig(cold_start=400, train=64, fresh=4, shifted=2),
            mesh=recipes.MeshConfig(replica=2, fsdp=2, tensor=1, cpu_devices=4),
            engine=change(recipe.setup.engine, max_rows=64, chunk=64),
            prompt_buckets=(48,),
            length_buckets=(112,),
            log_every=1,
            checkpoint_every=EVERY,
            heldout=heldout,
        ),
        sft=recipes.SFT(fitting("sft", 16)),
        rft=change(
            recipe.rft, records=48, orders=2, chunk=16, text_weight=0.5, fitting=fitting("rft")
        ),
        rl=change(
            recipe.rl,
            steps=STEPS["rl"],
            prompts=4,
            orders=2,
            group=4,
            placeless=True,
            text_weight=0.5,
            train_groups=4,
        ),
        meta_rm=change(
            recipe.meta_rm, records=8, samples=2, holdout=0.2, fitting=fitting("meta_rm")
        ),
        scalar_rm=change(recipe.scalar_rm, fitting=fitting("scalar_rm")),
    )


def run_stage(name: str, run_dir: Path, heldout: HeldOutConfig = HeldOutConfig()) -> None:
    """One stage with everything fresh, as a new process would."""
    SIZES["micro"] = MICRO
    recipe = make_recipe(run_dir, heldout)
    run = Run(recipe.setup)
    steps: dict[str, Callable[[], object]] = {
        "sft": lambda: run_sft(run, recipe.sft),
        "rft": lambda: run_rft(run, recipe.rft),
        "rl": lambda: run_rl(run, recipe.rl),
        "meta_rm": lambda: run_meta_rm(run, recipe.meta_rm),
        "scalar_rm": lambda: run_scalar_rm(run, recipe.scalar_rm),
    }
    steps[name]()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """A run directory with all stages done, none interrupted."""
    if len(jax.devices()) != 4:
        pytest.skip(f"needs 4 devices, have {len(jax.devices())}")
    root = tmp_path_factory.mktemp("whole_run")
    for name in STAGES:
        run_stage(name, root)
    return root


@pytest.fixture
def before(whole_run, tmp_path) -> Callable[[str], Path]:
    """stage -> a copy of the run as it was before that stage."""

    def make(name: str) -> Path:
        for done in ("world", *STAGES[: STAGES.index(name)]):
            shutil.copytree(whole_run / done, tmp_path / done)
        return tmp_path

    return make


@functools.cache
def leaves(model: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_model(model)[1])]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def same_stage(found: Path, expected: Path) -> None:
    """Bit for bit the same parameters, logged losses, rollouts and trajectories."""
    pairs = zip(leaves(found / "model"), leaves(expected / "model"), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    logged = [
        [(r["step"], r["loss"]) for r in rows(d / "metrics.jsonl") if "heldout/n" not in r]
        for d in (found, expected)
    ]
    assert logged[0] == logged[1]
    for name in ("trajectories.jsonl", "rollouts.jsonl", "samples.jsonl", "heldout.json"):
        assert (found / name).exists() == (expected / name).exists()
        if (found / name).exists():
            assert (found / name).read_bytes() == (expected / name).read_bytes()
    assert not (found / "checkpoints").exists() and not (found / "model.partial").exists()


def test_every_stage_leaves_a_model_that_stands_alone(whole_run):
    for name in STAGES:
        files = {path.name for path in (whole_run / name / "model").iterdir()}
        assert {"model.json", "params", "tokenizer.json", "grm.json"} <= files
        logged = rows(whole_run / name / "metrics.jsonl")
        assert [row["step"] for row in logged] == list(range(1, STEPS[name] + 1))
        assert all(row["loss"] is not None for row in logged)
        # A step of RL has a gradient just where a group has signal.
        assert all((row["grad_norm"] > 0) == (row.get("signal", 1.0) > 0) for row in logged)
        assert not (whole_run / name / "checkpoints").exists()
    moved = [
        max(np.abs(a - b).max() for a, b in zip(*(leaves(whole_run / n / "model") for n in pair)))  # noqa: B905
        for pair in (("sft", "rft"), ("rft", "rl"))
    ]
    assert min(moved) > 1e-4


def test_rft_learns_wrong_critiques_too_where_it_relabels(before, monkeypatch):
    root, learnt = before("rft"), []
    monkeypatch.setattr(rft, "train_on", lambda stage, fitting, rows, *_: learnt.append(rows))
    recipe = make_recipe(root)
    run = Run(recipe.setup)
    run_rft(run, dataclasses.replace(recipe.rft, relabel=True))
    file = root / "rft" / "trajectories.jsonl"
    found = [row for row in read_trajectories(file) if isinstance(row, Trajectory)]
    wrong = [row for row in found if not row.correct]
    exchanged = [relabelled(row, run.templates) for row in wrong]
    assert any(exchanged) and all(row.kept == bool(row.correct) for row in found)
    (examples,) = learnt
    assert len(examples) == len(found) - len(wrong) + sum(row is not None for row in exchanged)
    # When it is taken up again, the same is learnt from the file.
    run_rft(Run(recipe.setup), dataclasses.replace(recipe.rft, relabel=True))
    assert learnt[1] == examples


@pytest.mark.parametrize(
    ("change", "setup", "message"),
    [
        ({"orders": 9}, {}, r"orders 9: 4 critiques .* in more than 4 orders; .*samples 8"),
        ({"relabel": True}, {"many": "judge"}, r"relabel exchanges .* 'judge' asks for the place"),
    ],
)  # fmt: skip
def test_rft_refuses_options_that_do_not_go_together(tmp_path, change, setup, message):
    recipe = make_recipe(tmp_path)
    templates = dataclasses.replace(recipe.setup.templates, **setup)
    run = Run(dataclasses.replace(recipe.setup, templates=templates))
    with pytest.raises(ConfigError, match=message):
        run_rft(run, dataclasses.replace(recipe.rft, **change))
    assert not (tmp_path / "rft").exists()


def test_rft_trajectories_follow_the_rules(whole_run):
    found = [row for row in read_trajectories(whole_run / "rft" / "trajectories.jsonl")]
    recipe = make_recipe(whole_run).rft
    groups: dict[str, list[Trajectory]] = {}
    for row in found:
        assert isinstance(row, Trajectory)
        groups.setdefault(row.example_id, []).append(row)
    assert len(groups) == recipe.records
    for group in groups.values():
        plain, hinted = group[:-1], group[-1]
        assert len(plain) == recipe.samples and hinted.hinted
        several = len(group[0].responses) > 1
        assert (plain[0].order != plain[1].order) == several and plain[2].order == plain[0].order
        right = [bool(row.correct) for row in plain]
        assert [row.kept for row in plain] == [r and not all(right) for r in right]
        assert hinted.kept == hinted.correct
    assert any(row.kept for group in groups.values() for row in group)


def test_rl_rows_fit_their_metrics(whole_run):
    rollouts, logged = (
        rows(whole_run / "rl" / "rollouts.jsonl"),
        rows(whole_run / "rl" / "metrics.jsonl"),
    )
    recipe = make_recipe(whole_run).rl
    for row in logged:
        mine = [r for r in rollouts if r["step"] == row["step"]]
        assert len(mine) == recipe.prompts * recipe.group
        assert row["reward"] == pytest.approx(np.mean([r["reward"] for r in mine]), abs=1e-6)
        assert row["unparsable"] == pytest.approx(np.mean(["failure" in r for r in mine]))
        # One update a rollout: the policy that learns is the one that sampled.
        assert row["logprob_gap"] < 1e-4
        assert {"kl", "entropy", "seconds/rollout", "seconds/update"} <= row.keys()
    assert logged[0]["kl"] < 1e-6 < logged[-1]["kl"], "it begins at the reference"
    assert len({r["example_id"] for r in rollouts}) > recipe.prompts
    for step in (logged[0]["step"], logged[-1]["step"]):
        groups = collections.Counter(
            (r["example_id"], tuple(r["order"])) for r in rollouts if r["step"] == step
        )
        records = collections.Counter(id for id, _ in groups)
        assert len(records) == recipe.prompts // recipe.orders
        for (id, order), count in groups.items():
            assert records[id] == min(len(order), recipe.orders)
            assert count == recipe.group * recipe.orders // records[id]


def test_done_stages_are_not_run_again(whole_run):
    before = {path: path.stat().st_mtime_ns for path in whole_run.rglob("*") if path.is_file()}
    for name in STAGES:
        run_stage(name, whole_run)
    assert {p: p.stat().st_mtime_ns for p in whole_run.rglob("*") if p.is_file()} == before


def interrupt(monkeypatch, what: str, at: int, how: Callable[[], None]) -> None:
    """Call `how` when the metrics of step `at` are written, which is during the next, once."""
    write = MetricsWriter.write

    def hooked(self, step, values):
        write(self, step, values)
        if step == at:
            monkeypatch.setattr(MetricsWriter, "write", write)
            how()

    monkeypatch.setattr(MetricsWriter, "write", hooked)


@pytest.mark.parametrize("name", STAGES[1:])
def test_a_stopped_stage_resumes_as_if_it_had_not_been(name, whole_run, before, monkeypatch):
    """SIGTERM between two checkpoints: it saves where it is."""
    run_dir = before(name)
    interrupt(monkeypatch, name, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match=f"{name} saved at step 3"):
        run_stage(name, run_dir)
    assert (run_dir / name / "checkpoints").exists()
    run_stage(name, run_dir)
    same_stage(run_dir / name, whole_run / name)


MEASURED = {
    "sft": ("accuracy", "unparsable"),
    "rft": ("accuracy", "unparsable"),
    "rl": ("accuracy", "unparsable"),
    "meta_rm": ("accuracy", "loss", "auc", "auc_within_item", "auc_ties", "auc_decisive"),
    "scalar_rm": ("accuracy", "loss"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_measuring_held_out_records_changes_nothing(name, whole_run, before, monkeypatch):
    """The same bits as without, also when stopped; and one row for each measured step."""
    run_dir, last = before(name), STEPS[name]
    every = last // 3
    records = str(whole_run / "world" / "heldout.jsonl")
    heldout = HeldOutConfig(every=every, records=records, limit=6)
    # In the middle of the second measurement's row, which is after a checkpoint.
    interrupt(monkeypatch, name, 2 * every, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match=f"{name} saved at step {2 * every}"):
        run_stage(name, run_dir, heldout)
    run_stage(name, run_dir, heldout)
    same_stage(run_dir / name, whole_run / name)
    measured = [row for row in rows(run_dir / name / "metrics.jsonl") if "heldout/n" in row]
    steps = sorted({*range(every, last + 1, every), last})
    assert [row["step"] for row in measured] == steps
    for row in measured:
        names = {key for key in row if key.startswith("heldout/")}
        assert names == {"heldout/n", *(f"heldout/{metric}" for metric in MEASURED[name])}
        assert 0 <= row["heldout/accuracy"] <= 1 and row["heldout/n"] > 0
    assert not any(
        "heldout" in key for row in rows(whole_run / name / "metrics.jsonl") for key in row
    )


class Crash(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rft", "rl"])
def test_a_crashed_stage_repeats_what_was_lost(name, whole_run, before, monkeypatch):
    """It falls back to the checkpoint before, and draws the same batches and rollouts again."""
    run_dir = before(name)

    def crash() -> None:
        raise Crash

    interrupt(monkeypatch, name, STEPS[name], crash)
    with pytest.raises(Crash):
        run_stage(name, run_dir)
    assert len(rows(run_dir / name / "metrics.jsonl")) == STEPS[name]
    run_stage(name, run_dir)
    same_stage(run_dir / name, whole_run / name)


def test_a_stop_at_the_last_step_is_resumed_too(whole_run, before, monkeypatch):
    run_dir = before("scalar_rm")
    last = STEPS["scalar_rm"]
    interrupt(monkeypatch, "scalar_rm", last, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match=f"saved at step {last}"):
        run_stage("scalar_rm", run_dir)
    run_stage("scalar_rm", run_dir)
    same_stage(run_dir / "scalar_rm", whole_run / "scalar_rm")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "chunk", "total"),
    [("rft", "trajectories.jsonl", 16, 48), ("meta_rm", "samples.jsonl", 3, 8)],
)
def test_sampling_resumes_with_the_next_chunk(
    name, file, chunk, total, whole_run, before, monkeypatch
):
    """SIGTERM ends it at once; whole chunks are kept, and none of them is sampled again. Progress
    counts critiques as they end."""
    run_dir = before(name)
    monkeypatch.setattr(meta_rm, "CHUNK", 3)
    each = len((whole_run / name / file).read_text(encoding="utf-8").splitlines()) // total
    update, calls = Progress.update, []

    def hooked(self, *args):
        update(self, *args)
        if self.what == f"{name} sampling":
            assert self.total == each * total
            calls.append(self.done)
            if len(calls) == each * chunk + 2:  # within the second chunk
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "update", hooked)
    with (
        pytest.raises(Stopped, match=f"{name} saved after {chunk} of {total}") as stopped,
        stopping.handled(),
    ):
        run_stage(name, run_dir)
    assert stopped.value.terminated
    run_stage(name, run_dir)
    kept = each * chunk
    assert calls == [*range(1, kept + 3), *range(kept + 1, each * total + 1)]
    same_stage(run_dir / name, whole_run / name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "module", "what"),
    [
        ("scalar_rm", "scalar_rm", "calibrate"),
        ("meta_rm", "meta_rm", "validate"),
        ("rl", "storage", "save_model"),
    ],
)
def test_a_stop_after_the_last_step_repeats_only_what_came_after(
    name, module, what, whole_run, before, monkeypatch
):
    """The last step is a checkpoint until the model stands, whatever `checkpoint_every` is."""
    run_dir = before(name)
    owner = {"scalar_rm": scalar_rm, "meta_rm": meta_rm, "storage": storage}[module]

    def stop(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal comes first")

    with monkeypatch.context() as patch:
        patch.setattr(owner, what, stop)
        with pytest.raises(stopping.Interrupted), stopping.handled():
            run_stage(name, run_dir)
    steps = rows(run_dir / name / "metrics.jsonl")
    assert steps[-1]["step"] == STEPS[name]
    run_stage(name, run_dir)
    assert rows(run_dir / name / "metrics.jsonl") == steps, "no step was taken again"
    same_stage(run_dir / name, whole_run / name)


def test_a_changed_recipe_is_not_resumed(whole_run, monkeypatch):
    monkeypatch.setitem(STEPS, "rl", 7)
    with pytest.raises(recipes.ConfigError, match=r"stage.steps: 6 -> 7"):
        run_stage("rl", whole_run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rft", "rl", "meta_rm"])  # the other two do not sample
def test_a_killed_process_is_resumed(name, whole_run, before):
    """SIGKILL in a process of its own, when a checkpoint is on disk and steps after it are lost."""
    run_dir = before(name)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, name, str(run_dir)]
    log = run_dir / name / "metrics.jsonl"
    process = subprocess.Popen([*command, str(EVERY + 1)], env=environment)
    checkpoint = run_dir / name / "checkpoints" / f"{EVERY}.files.json"
    while process.poll() is None and not (
        log.exists() and log.read_bytes().count(b"\n") > EVERY and checkpoint.exists()
    ):
        time.sleep(0.01)
    assert process.poll() is None, "it ended by itself"
    process.kill()
    process.wait()
    assert not (run_dir / name / "model").exists()
    subprocess.run(command, env=environment, check=True)
    same_stage(run_dir / name, whole_run / name)


def hold(at: int) -> None:
    """Wait for the end when the metrics of step `at` are written."""
    write = MetricsWriter.write

    def hooked(self, step, values):
        write(self, step, values)
        while step == at:
            time.sleep(1)

    MetricsWriter.write = hooked


if __name__ == "__main__":
    from grm_jax.train import setup_devices

    setup_devices(4)
    if len(sys.argv) > 3:
        hold(int(sys.argv[3]))
    run_stage(sys.argv[1], Path(sys.argv[2]))


@pytest.fixture
def evaluated(whole_run, tmp_path, monkeypatch) -> Callable[..., tuple[list[str], int]]:
    """A copy of the run; evaluates it and returns the headers of its table and counts samples."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole_run, run_dir)
    SIZES["micro"] = MICRO

    def evaluate(**changes) -> tuple[list[str], int]:
        recipe = make_recipe(run_dir)
        wanted = dataclasses.replace(recipes.Evaluation(k=2), **changes)
        recipe = dataclasses.replace(recipe, evaluation=wanted)
        drawn = []
        critiques = Critic.critiques

        def counted(self, params, records, samples, *args, **kwargs):
            drawn.append(len(records) * len(samples))
            return critiques(self, params, records, samples, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(Critic, "critiques", counted)
            summary = evaluate_pipeline(Run(recipe.setup), recipe.evaluation, 8)
        assert set(summary["figures"]) == {"SFT", "RFT", "RL", "scalar (Bradley-Terry)"}
        for stage in ("SFT", "RFT", "RL"):
            assert f"hybrid@{wanted.k}" in summary["figures"][stage]
        assert f"RL: hybrid@{wanted.k} over the scalar RM" in summary["differences"]
        for shifted in summary["shifted"].values():
            assert {"scalar", f"hybrid@{wanted.k}"} <= set(shifted)
        table = (run_dir / "evaluation" / "table.md").read_text(encoding="utf-8")
        header = next(line for line in table.splitlines() if line.startswith("| model"))
        return [cell.strip() for cell in header.split("|")], sum(drawn)

    return evaluate


@pytest.mark.slow
def test_the_evaluation_belongs_to_the_models_that_it_judged(evaluated, tmp_path, whole_run):
    """Nothing is sampled twice, another k is another table, and a new model is judged anew."""
    header, drawn = evaluated(k=4)
    assert "vote@4" in header and "sample@1" in header and drawn > 0
    assert evaluated(k=4) == (header, 0), "everything is kept"
    more, added = evaluated(k=8)
    assert "vote@8" in more and added == drawn // 5 * 4
    assert evaluated(k=4) == (header, 0)
    assert evaluated(k=4, records=2) == (header, 0)
    model = tmp_path / "run" / "rl" / "model"
    shutil.rmtree(model)
    shutil.copytree(whole_run / "rft" / "model", model)
    assert 0 < evaluated(k=4)[1] < drawn, "the RL model alone is another one"
