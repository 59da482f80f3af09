"""A run that an earlier version began is resumed: `run_of_6df3ca5.tar.gz`.

A finished supervised stage and a scalar RM stopped at step 4 of 8, of a model of a few thousand
parameters, with the parameters that the earlier version itself ended with (`expected.npz`). Made by
running this file as a script with that commit's package:

    PYTHONPATH=CHECKOUT_OF_6df3ca5 python tests/training/test_earlier_runs.py
"""

from __future__ import annotations

import os
import shutil
import signal
import tarfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from grm_jax.critique.template_set import TemplateConfig
from grm_jax.data.synthetic import WorldConfig
from grm_jax.metrics import MetricsWriter
from grm_jax.model.config import SIZES, ModelConfig
from grm_jax.model.storage import load_model
from grm_jax.parallel.options import MeshConfig
from grm_jax.training.options import SFT, Fitting, OptimizerConfig, ScalarRM
from grm_jax.training.run import Run
from grm_jax.training.scalar_rm import run_scalar_rm
from grm_jax.training.setup import ConfigError, Setup
from grm_jax.training.sft import run_sft

ARCHIVE = Path(__file__).with_name("run_of_6df3ca5.tar.gz")
MODEL = ModelConfig(
    num_layers=2,
    embed_dim=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    hidden_dim=16,
    query_pre_attn_scalar=4,
    sliding_window=16,
    max_position=512,
)
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, schedule="cosine", warmup_steps=2, weight_decay=0.01
)


def stages(root: Path, steps: int = 8, **changes: Any) -> None:
    """The supervised stage, if it is not done, and the scalar RM."""
    SIZES["old"] = MODEL
    options: dict[str, Any] = {
        "run_dir": str(root),
        "size": "old",
        "templates": TemplateConfig(many="compact", single="compact_single", meta="compact_meta"),
        "world": WorldConfig(cold_start=24, train=24, fresh=2, shifted=1),
        "mesh": MeshConfig(1, 1, 1),
        "length_buckets": (32, 72, 112),
        "prompt_buckets": (32, 48),
        "remat": "none",
        "logprob_chunk": 1 << 20,
        "checkpoint_every": 2,
        "log_every": 1,
    }
    run = Run(Setup(**(options | changes)), jax.local_devices()[:1])
    run_sft(run, SFT(Fitting(steps=3, batch_size=4, optimizer=OPTIMIZER)))
    fitting = Fitting(steps=steps, batch_size=4, optimizer=OPTIMIZER)
    run_scalar_rm(run, ScalarRM(start="sft", fitting=fitting))


def parameters(model: Path) -> dict[str, np.ndarray]:
    _, params = load_model(model)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


@pytest.fixture
def begun(tmp_path) -> Path:
    shutil.unpack_archive(ARCHIVE, tmp_path)
    return tmp_path / "run"


@pytest.mark.parametrize(
    "changes",
    [{}, {"remat": "block", "checkpoint_every": 3, "length_buckets": (32, 72, 120)}],
    ids=["the same", "computed otherwise"],
)
def test_a_run_of_an_earlier_version_is_resumed(changes, begun, caplog):
    before = (begun / "sft" / "model" / "model.json").stat().st_mtime_ns
    with caplog.at_level("WARNING", "grm_jax"):
        stages(begun, **changes)
    assert (begun / "sft" / "model" / "model.json").stat().st_mtime_ns == before
    steps = (begun / "scalar_rm" / "metrics.jsonl").read_text().splitlines()
    assert len(steps) == 8
    found, expected = parameters(begun / "scalar_rm" / "model"), np.load(begun / "expected.npz")
    assert found.keys() == set(expected.files)
    if "length_buckets" in changes:
        assert "from step 4 on the data is shuffled anew" in caplog.text
        return
    assert "shuffled anew" not in caplog.text
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5, err_msg=name)


def test_what_the_run_is_may_not_change(begun):
    with pytest.raises(ConfigError, match=r"stage.fitting.steps: 8 -> 9"):
        stages(begun, steps=9)
    with pytest.raises(ConfigError, match=r"setup.seed: 0 -> 1"):
        stages(begun, seed=1)


def make() -> None:
    """Write the archive, with the package of the commit that it is named after."""
    write, killed = MetricsWriter.write, []

    def hooked(self, step, values):
        write(self, step, values)
        if "loss" in values and step == 4 and not killed:
            killed.append(step)
            os.kill(os.getpid(), signal.SIGTERM)

    MetricsWriter.write = hooked
    run, whole = Path("run"), Path("whole")
    try:
        stages(run)
    except Exception as stopped:
        if type(stopped).__name__ != "Stopped":
            raise
    shutil.copytree(run, whole)
    stages(whole)
    np.savez_compressed(run / "expected.npz", **parameters(whole / "scalar_rm" / "model"))
    with tarfile.open(ARCHIVE.name, "w:gz") as archive:
        archive.add(run, "run", filter=lambda i: None if "tfevents" in i.name else i)


if __name__ == "__main__":
    make()
