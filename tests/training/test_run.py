"""What stages share: directories, recipes as used, models by name, signals; reward heads."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from grm_jax.checkpoint import drop_leftovers
from grm_jax.critique import Template
from grm_jax.critique.template_set import TemplateConfig
from grm_jax.data.synthetic import WorldConfig
from grm_jax.errors import UserError
from grm_jax.judge.about import About
from grm_jax.judge.request import JudgeDefaults
from grm_jax.model.config import SIZES
from grm_jax.model.hf_config import CheckpointError
from grm_jax.model.storage import save_model
from grm_jax.parallel.options import MeshConfig
from grm_jax.recipes import SPCTRecipe
from grm_jax.sampler.options import SamplingConfig
from grm_jax.scoring.statistics import roc_auc
from grm_jax.stopping import Stopped
from grm_jax.train import shared_options
from grm_jax.training import meta_rm, rft, scalar_rm
from grm_jax.training.options import RFT, SFT, Fitting, MetaRM
from grm_jax.training.run import MissingStage, Run, Stage
from grm_jax.training.setup import ConfigError, GuardConfig, KeepConfig, Setup
from grm_jax.training.spct import StageTimes, run_spct

WORLD = WorldConfig(cold_start=5, train=5, fresh=2, shifted=1)


@pytest.fixture
def setup(tmp_path, monkeypatch, model) -> Setup:
    monkeypatch.setitem(SIZES, "micro", model)
    return Setup(run_dir=str(tmp_path / "run"), size="micro", world=WORLD, mesh=MeshConfig(2, 2, 1))


@pytest.fixture
def run(setup) -> Run:
    return Run(setup)


def test_the_vocabulary_of_a_declared_size_is_the_tokenizers(run, model):
    assert run.model == model.replace(vocab_size=run.tokenizer.vocab_size)


def test_the_world_is_written_once_and_another_one_refused(run, setup):
    before = (run.world / "train.jsonl").stat().st_mtime_ns
    assert (Run(setup).world / "train.jsonl").stat().st_mtime_ns == before
    other = dataclasses.replace(setup, world=dataclasses.replace(WORLD, seed=1))
    with pytest.raises(ConfigError, match=r"world holds another world \(seed: 0 -> 1\); give ano"):
        _ = Run(other).world


def test_parameters_by_name(run, setup, tmp_path):
    base = run.params("base")
    again = Run(setup).params("base")
    assert all(map(np.array_equal, jax.tree.leaves(base), jax.tree.leaves(again)))
    assert not base["embed"].is_fully_replicated
    other = Run(dataclasses.replace(setup, seed=1)).params("base")
    assert not np.array_equal(base["embed"], other["embed"])
    save_model(tmp_path / "run" / "sft" / "model", run.model, base)
    save_model(tmp_path / "elsewhere", run.model, jax.tree.map(lambda x: x + 1, base))
    assert np.array_equal(run.params("sft")["embed"], base["embed"])
    assert np.array_equal(run.params(str(tmp_path / "elsewhere"))["embed"], base["embed"] + 1)


def test_scalar_heads(run, make_params, tmp_path):
    """A missing one starts at zero, one that is there is read, and a critic has none."""
    fresh = run.params("base", num_labels=1)
    assert fresh["score"].shape == (run.model.embed_dim, 1) and not fresh["score"].any()
    trained = make_params(run.model, 0, num_labels=1)
    save_model(tmp_path / "run" / "meta_rm" / "model", run.model, trained)
    assert np.array_equal(run.params("meta_rm", num_labels=1)["score"], trained["score"])
    with pytest.raises(CheckpointError, match=r"meta_rm/model: a scalar model .* language model"):
        run.params("meta_rm")
    plain = {name: value for name, value in trained.items() if name != "score"}
    save_model(tmp_path / "run" / "sft" / "model", run.model, plain)
    assert not run.params("sft", num_labels=1)["score"].any()


def test_a_missing_stage_says_how_to_make_it(run, setup):
    for lookup in (run.params, run.require, run.model_dir):
        with pytest.raises(MissingStage, match=r"needs the rft stage's model") as error:
            lookup("rft")
        assert f"--config rft.py --run-dir {setup.run_dir}" in str(error.value)
        assert "--init PATH" in str(error.value)


def test_a_model_of_another_shape_is_refused(run, make_params, tmp_path):
    other = run.model.replace(hidden_dim=24)
    save_model(tmp_path / "other", other, make_params(other, 0))
    with pytest.raises((ConfigError, ValueError), match=r"shape"):
        run.params(str(tmp_path / "other"))


def begun(run, used=SFT(), **options) -> Path:
    """A stage that has something to lose; its config.json."""
    stage = Stage(run, "sft", used, **options)
    stage.begin()
    (stage.directory / "trajectories.jsonl.partial").write_text("{}\n")
    return stage.directory / "config.json"


def test_a_stage_refuses_a_changed_recipe(run, setup):
    config = begun(run)
    Stage(run, "sft", SFT()).begin()
    kept = config.read_text()
    changed = SFT(Fitting(steps=7))
    with pytest.raises(ConfigError, match=r"sft was begun with another recipe") as error:
        Stage(run, "sft", changed)
    assert "stage.fitting.steps: 900 -> 7" in str(error.value)
    with pytest.raises(ConfigError, match=r"setup.seed: 0 -> 5"):
        Stage(Run(dataclasses.replace(setup, seed=5)), "sft", SFT())
    with pytest.raises(ConfigError, match=r"setup.engine.int8_cache: False -> True"):
        engine = dataclasses.replace(setup.engine, int8_cache=True)
        Stage(Run(dataclasses.replace(setup, engine=engine)), "sft", SFT())
    assert config.read_text() == kept


def test_how_it_is_computed_may_change(run, setup, caplog):
    """Memory, devices, attention, micro-batches, buckets, logging: what a failed run is told to
    change."""
    begun(run)
    other = dataclasses.replace(
        setup, remat="offload", attention="reference", logprob_chunk=64, log_every=3,
        checkpoint_every=9, length_buckets=(16, 128), prompt_buckets=(8, 64), judge=JudgeDefaults(),
        guard=GuardConfig(spike=99), keep=KeepConfig(latest=5), profile="1:2",
        engine=dataclasses.replace(setup.engine, max_rows=8, page=4, cache_bytes=1 << 20),
    )  # fmt: skip
    parts = dataclasses.replace(SFT().fitting, device_batch=2)
    with caplog.at_level("INFO", "grm_jax"):
        stage = Stage(Run(other), "sft", SFT(parts))
    assert "setup.remat: 'block' -> 'offload'" in caplog.text
    assert "stage.fitting.device_batch: 0 -> 2" in caplog.text
    stage.begin()
    caplog.clear()
    Stage(Run(other), "sft", SFT(parts))
    assert "resumed with changes" not in caplog.text


def test_a_recipe_alone_has_begun_nothing(run):
    """What is corrected after a failed start is not refused."""
    Stage(run, "sft", SFT()).begin()
    (run.directory / "sft" / "metrics.jsonl").write_text("")
    (run.directory / "sft" / "checkpoints").mkdir()
    Stage(run, "sft", SFT(Fitting(steps=7))).begin()
    kept = json.loads((run.directory / "sft" / "config.json").read_text())
    assert kept["stage"]["fitting"]["steps"] == 7


def test_fields_of_other_versions_take_their_defaults(run):
    config = begun(run)
    values = json.loads(config.read_text())
    del values["setup"]["skip_bad_rows"], values["stage"]["fitting"]["pack"]
    config.write_text(json.dumps(values))
    Stage(run, "sft", SFT())
    with pytest.raises(ConfigError, match=r"stage.fitting.pack: 0 -> 64"):
        Stage(run, "sft", SFT(Fitting(pack=64)))
    values["setup"]["gone"] = True
    config.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"setup.gone: True -> None"):
        Stage(run, "sft", SFT())


def test_the_config_of_an_earlier_version_is_read(run, setup):
    """It named files by path and had checksums of the data alone."""
    config = begun(run)
    values = json.loads(config.read_text())
    del values["content"]
    values["data"] = {}
    for name in ("run_dir", "log_every", "checkpoint_every", "keep", "mesh", "profile"):
        del values["setup"][name]
    config.write_text(json.dumps(values))
    Stage(run, "sft", SFT())
    values["data"] = {"x.jsonl": "0123456789abcdef"}
    config.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"the data files: \['0123456789abcdef'\] -> \[\]"):
        Stage(run, "sft", SFT())


def test_files_are_known_by_what_they_say(setup, tmp_path, monkeypatch):
    """The same data or template elsewhere is the same; another at the same path is not."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(name).mkdir()
        Path(name, "x.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
        Path(name, "many.jinja").write_text(
            "{# grm_jax: name=mine low=1 high=10 reads=scores #}\n{{ query }} {{ responses }}"
        )

    def made(name: str) -> Run:
        templates = dataclasses.replace(setup.templates, many=f"{name}/many.jinja")
        return Run(dataclasses.replace(setup, instructions=f"{name}/x.jsonl", templates=templates))

    begun(made("a"))
    Stage(made(str(tmp_path / "b")), "sft", SFT())
    with Path("a/many.jinja").open("a") as file:
        file.write(" more")
    with pytest.raises(ConfigError, match=r"content.templates.many: '.*' -> '"):
        Stage(made("a"), "sft", SFT())
    Path("b/x.jsonl").write_text('{"prompt": "q", "chosen": "b", "rejected": "a"}\n')
    with pytest.raises(ConfigError, match=r"the data files: "):
        Stage(made("b"), "sft", SFT())


def test_a_stage_made_from_another_model_is_not_done(run, make_params):
    """A stage is trained again after the one that it starts from was."""

    def trained(seed: int) -> None:
        folder = run.directory / "rft" / "model"
        shutil.rmtree(folder, ignore_errors=True)
        save_model(folder, run.model, make_params(run.model, seed))
        run.digest.cache_clear()

    trained(0)
    begun(run, needs=["rft"])
    Stage(run, "sft", SFT(), needs=["rft"])
    trained(1)
    with pytest.raises(ConfigError, match="the model it was made from, rft, is another one now"):
        Stage(run, "sft", SFT(), needs=["rft"])
    shutil.rmtree(run.directory / "rft")
    run.digest.cache_clear()
    Stage(run, "sft", SFT(), needs=["rft"])


def test_another_start_is_refused_and_the_same_one_elsewhere_is_not(
    run, setup, make_params, tmp_path
):
    """Whatever it is called: a stage, a path, a base that was not there before."""
    rft, copy, other = run.directory / "rft" / "model", tmp_path / "copy", tmp_path / "other"
    for folder, seed in ((rft, 0), (other, 1)):
        save_model(folder, run.model, make_params(run.model, seed))
        run.tokenizer.save(folder)
    shutil.copytree(rft, copy)
    begun(run, needs=["rft"])
    Stage(run, "sft", SFT(), str(copy), [str(copy)])
    with pytest.raises(ConfigError, match=f"made from, {other}, is another one now"):
        Stage(run, "sft", SFT(), str(other), [str(other)])
    with pytest.raises(ConfigError, match=r"number of models it is made from: 1 -> 2"):
        Stage(run, "sft", SFT(), needs=["rft", str(other)])
    # A base where there was none, with a tokenizer that was named before too.
    named = dataclasses.replace(setup, tokenizer=str(run.world / "tokenizer"))
    shutil.rmtree(run.directory / "sft")
    begun(Run(named), needs=["base"])
    Stage(Run(named), "sft", SFT(), needs=["base"])
    with pytest.raises(ConfigError, match="made from, base, is another one now"):
        Stage(Run(dataclasses.replace(named, base=str(other))), "sft", SFT(), needs=["base"])


def test_a_stage_that_can_not_begin_leaves_nothing(run):
    with pytest.raises(MissingStage):
        Stage(run, "rl", SFT(), needs=["rft"]).begin()
    assert not (run.directory / "rl").exists()


def test_a_finished_model_holds_the_text_of_its_templates(setup, tmp_path, monkeypatch):
    own = tmp_path / "own.jinja"
    own.write_text(
        "{# grm_jax: name=own low=0 high=5 reads=scores #}\n{{ query }}{{ responses }}\n"
    )
    monkeypatch.chdir(tmp_path)
    names = dataclasses.replace(setup.templates, many="own.jinja")
    run = Run(dataclasses.replace(setup, templates=names))
    text = own.read_text()
    own.unlink()  # what the run began with is what it wrote
    stage = Stage(run, "sft", SFT())
    stage.begin()
    stage.finish(run.params("base"))
    monkeypatch.chdir("/")
    about = About.read(stage.model_path)
    assert about.templates is not None and about.templates.many.source == text
    assert about.templates.meta.source == Template.load("meta").source
    assert (about.stage, about.trained, about.judge) == ("sft", True, setup.judge)
    assert (about.engine, about.length_buckets) == (setup.engine, setup.length_buckets)


def test_stage_keys_differ(run):
    names = ["init", "sft", "rft", "rl", "meta_rm", "scalar_rm", "heldout"]
    keys = {tuple(jax.random.key_data(run.stage_key(name)).tolist()) for name in names}
    assert len(keys) == len(names)


def fill_disk(monkeypatch, name: str) -> None:
    """No room for a file of about this name: it is made, and stays empty."""
    write = Path.write_text

    def attempt(path: Path, *args, **options) -> int:
        if name not in path.name:
            return write(path, *args, **options)
        path.open("w").close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", attempt)


def test_a_model_that_can_not_be_written_names_its_file_and_leaves_the_checkpoints(
    run, monkeypatch
):
    stage = Stage(run, "sft", SFT())
    stage.begin()
    kept = stage.directory / "checkpoints" / "1"
    kept.mkdir(parents=True)
    params = run.params("base")
    for name in ("model.json", "chat_template.jinja", "grm.json"):
        with monkeypatch.context() as full:
            fill_disk(full, name)
            with pytest.raises(OSError, match="No space") as error:
                stage.finish(params)
        assert str(stage.directory / "model.partial") in str(error.value.filename)
        assert kept.is_dir() and not stage.done
    stage.finish(params)
    assert stage.done and not kept.exists()


@pytest.mark.parametrize("stage", ["rft", "meta_rm"])
def test_room_for_a_checkpoint_is_tried_before_anything_is_sampled(setup, monkeypatch, stage):
    templates = TemplateConfig("compact", "compact_single", "compact_meta")
    run = Run(dataclasses.replace(setup, templates=templates))
    sampling = SamplingConfig(max_new_tokens=8)
    monkeypatch.setattr(run, "new_critic", lambda order: pytest.fail("sampling begins"))
    monkeypatch.setattr(meta_rm, "earlier_rows", lambda *args: [])

    def attempt() -> None:
        if stage == "rft":
            rft.run_rft(run, RFT(sampling=sampling), "base")
        else:
            meta_rm.run_meta_rm(run, MetaRM(sampling=sampling, holdout=0.0), "base")

    _ = run.records  # its files are written, and read, before the limit
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(
            UserError, match=rf"{stage}/checkpoints: a checkpoint needs .*too large"
        ):
            attempt()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(pytest.fail.Exception, match="sampling begins"):
        attempt()


def test_checkpoints_that_can_not_be_deleted_are_named(tmp_path, monkeypatch, caplog):
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr("grm_jax.checkpoint.shutil.rmtree", lambda *args, **options: None)
    drop_leftovers(tmp_path)
    assert f"{tmp_path / 'checkpoints'} can not be deleted; delete it by hand" in caplog.text


def test_a_world_that_was_not_written_whole_is_written_again(run, setup, monkeypatch):
    with monkeypatch.context() as full:
        fill_disk(full, "world.json")
        with pytest.raises(OSError, match="No space"):
            _ = run.world
    assert (Run(setup).world / "world.json").stat().st_size


def test_a_world_is_only_written_by_the_command_that_holds_the_directory(run, monkeypatch):
    def refuse(directory):
        raise UserError(f"{directory}: in use")

    monkeypatch.setattr("grm_jax.training.run.hold", refuse)
    with pytest.raises(UserError, match="in use"):
        _ = run.world
    assert not run.directory.exists()


def test_a_done_pipeline_is_evaluated_by_one_command_at_a_time(run, monkeypatch):
    """Two would add the same samples to one cache. What is done is passed over: no times."""

    def refuse(directory):
        raise UserError(f"{directory}: in use")

    for stage in ("sft", "rft", "rl", "meta_rm", "scalar_rm"):
        monkeypatch.setattr(f"grm_jax.training.{stage}.run_{stage}", lambda *args: None)
        (run.directory / stage / "model" / "params").mkdir(parents=True)
        (run.directory / stage / "model" / "model.json").write_text("{}")
    monkeypatch.setattr("grm_jax.training.final_evaluation.hold", refuse)
    before = sorted(run.directory.rglob("*"))
    with pytest.raises(UserError, match="in use"):
        run_spct(run, SPCTRecipe(run.setup))
    assert sorted(run.directory.rglob("*")) == before


def test_stage_times_add_up_over_runs(tmp_path):
    for _ in range(2):
        times = StageTimes(tmp_path / "seconds.json")
        times.add("sft", 40.0)
    with pytest.raises(Stopped), times.measure("rl"):
        raise Stopped("saved")
    assert json.loads((tmp_path / "seconds.json").read_text())["sft"] == 80.0
    assert str(times).startswith("sft 1:20  rl 0:00  total 1:20")


def test_after_an_error_no_times_are_written(tmp_path, monkeypatch):
    """There may be no room for them, and the run directory may be another command's."""
    times = StageTimes(tmp_path / "seconds.json")
    with pytest.raises(UserError), times.measure("sft"):
        raise UserError("in use by another process")
    assert not any(tmp_path.iterdir())
    times.add("sft", 1.0)
    before = (tmp_path / "seconds.json").read_text()
    fill_disk(monkeypatch, "seconds.json")
    with pytest.raises(OSError, match="No space"):
        times.add("rl", 1.0)
    assert (tmp_path / "seconds.json").read_text() == before
    assert str(StageTimes(tmp_path / "seconds.json")).startswith("sft 0:01")


# The reward heads.


def test_pairs_are_all_better_worse_pairs(run, make_record):
    record = make_record("r", (1, 5, 5, 9), " sum 1 2")
    words = (" anna", " ben", " carl", " dora")
    pairs = scalar_rm.preference_pairs(run, dataclasses.replace(record, responses=words))
    name = {run.tokenizer.encode(w)[0]: w.strip() for w in words}
    found = {(name[a.completion[0]], name[b.completion[0]]) for a, b in pairs}
    assert len(pairs) == 5  # ben and carl are equal
    assert found == {
        ("dora", "anna"), ("dora", "ben"), ("dora", "carl"), ("ben", "anna"), ("carl", "anna"),
    }  # fmt: skip
    assert not scalar_rm.preference_pairs(run, make_record("s", (1,)))


def test_collated_pairs_hold_the_better_first(run, make_record):
    pairs = scalar_rm.preference_pairs(
        run, dataclasses.replace(make_record("r", (1, 5)), responses=(" anna", " ben"))
    )
    batch = scalar_rm.collate_pairs(pairs, 16)
    assert batch["tokens"].shape == (1, 2, 16)
    for place, example in enumerate(pairs[0]):
        length = batch["lengths"][0, place]
        assert batch["tokens"][0, place, :length].tolist() == [*example.prompt, *example.completion]


@pytest.mark.parametrize(
    ("scores", "labels", "low", "high"),
    [
        ([-2, -1, 1, 2], [0, 0, 1, 1], -1, 1),
        ([-2, -1, 1, 2], [0, 1, 0, 1], -2, 2),  # two cuts are as good
        ([3, 1, 2], [1, 1, 1], -99, 1),
        ([3, 1, 2], [0, 0, 0], 3, 99),
    ],
)
def test_the_threshold_separates_singles_best(monkeypatch, make_record, scores, labels, low, high):
    records = [make_record(str(i), (label,)) for i, label in enumerate(labels)]
    monkeypatch.setattr(
        scalar_rm, "reply_scores", lambda run, params, singles, size: [(float(s),) for s in scores]
    )
    mixed = [*records, make_record("pair", (0, 1))]
    threshold = scalar_rm.calibrate(None, {}, mixed, 4)  # pyright: ignore[reportArgumentType]
    assert low <= threshold <= high
    right = [
        (score > threshold) == (label == 1) for score, label in zip(scores, labels, strict=True)
    ]
    best = max(
        sum((s > cut) == (y == 1) for s, y in zip(scores, labels, strict=True))
        for cut in np.arange(-3, 4, 0.5)
    )
    assert sum(right) == best


def test_without_singles_there_is_no_threshold(make_record):
    pair = [make_record("pair", (0, 1))]
    assert scalar_rm.calibrate(None, {}, pair, 4) is None  # pyright: ignore[reportArgumentType]


def test_auc_of_the_meta_rm_is_the_chance_to_rank_right_above_wrong():
    assert roc_auc(np.asarray([0.1, 0.4, 0.35, 0.8]), np.asarray([0, 0, 1, 1])) == 0.75


def test_a_missing_stage_names_the_command_that_makes_it_here(setup, tmp_path):
    given = ["--run-dir", str(tmp_path / "my runs"), "--base=g 2b", "--preferences", "p.jsonl"]
    run = Run(setup, given=("2b", given))
    with pytest.raises(MissingStage) as error:
        run.require("rft")
    command = str(error.value).split("\n")[1].strip()
    words = shlex.split(command)
    assert words[:5] == ["python", "-m", "grm_jax.train", "--config", "rft.py:2b"]
    assert words[5:] == given
    assert "--config spct.py:2b" in str(error.value) and str(error.value).endswith("--init PATH")
    # Of what the meta RM starts from, --init says nothing.
    stage = Stage(run, "meta_rm", MetaRM(start="sft"), None, ["sft", "rl"])
    with pytest.raises(MissingStage, match=r"sft.py:2b(.|\n)*with --meta-rm.start base$"):
        stage.begin()
    save_model(run.directory / "sft" / "model", run.model, run.params("base"))
    with pytest.raises(MissingStage, match=r"rl.py:2b(.|\n)*with --init PATH$"):
        stage.begin()


def test_options_of_one_stage_are_not_those_of_another():
    args = ["--run-dir", "r", "--init", "m", "--rl.steps=9", "--rl.group", "8", "--length-buckets"]
    args += ["64", "128", "--meta-rm.no-rft-trajectories", "--skip-bad-rows", "--lora.rank", "4"]
    kept = [
        "--run-dir",
        "r",
        "--length-buckets",
        "64",
        "128",
        "--skip-bad-rows",
        "--lora.rank",
        "4",
    ]
    assert shared_options(args) == kept
