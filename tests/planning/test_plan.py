"""Plans: bytes from the shapes, what does not fit, and a compiled one where libtpu is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from grm_jax.model import compute_dtype
from grm_jax.model.config import model_config
from grm_jax.model.params import count_params, param_table
from grm_jax.parallel.devices import find_device
from grm_jax.planning.programs import DryPrograms, PlannedRun
from grm_jax.sampler.programs import Programs
from grm_jax.training.setup import Setup

ROOT = Path(__file__).resolve().parents[2]


def plan(*args: str) -> tuple[int, str]:
    """In a process of its own: it makes as many devices as it plans for."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "grm_jax.plan", *args],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def row(output: str, kind: str) -> list[float]:
    line = next(line for line in output.splitlines() if line.startswith(f"| {kind} |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")[1:]]
    return [float(cell) for cell in cells if cell != "-"]


@pytest.fixture(scope="module")
def full() -> str:
    code, output = plan("--config", "sft.py:2b", "--topology", "h100:8")
    assert code == 0, output
    return output


def test_state_is_split_over_all_devices(full):
    gib = count_params(param_table(model_config("2b"))) * 4 / 2**30 / 8
    assert row(full, "parameters") == [pytest.approx(gib, abs=0.01)]
    assert row(full, "optimizer") == [pytest.approx(2 * gib, abs=0.01)]
    assert "It fits." in full and "8 x H100" in full


def test_adapters_leave_little_to_train(full):
    code, output = plan(
        "--config", "sft.py:9b", "--topology", "h100:1", "--lora.rank=16", "--mesh.tensor=1"
    )
    assert code == 0, output
    frozen = count_params(param_table(model_config("9b"))) * 2 / 2**30
    assert row(output, "frozen weights") == [pytest.approx(frozen, abs=0.01)]
    assert row(output, "optimizer")[0] < 0.5


def test_every_stage_is_planned_as_it_runs():
    """Pairs are two rows; packed rows are as long as they are packed."""
    together = ["--scalar-rm.fitting.device-batch", "4"]  # the meta RM's
    code, pairs = plan("--config", "scalar_rm.py:2b", "--topology", "h100:8", *together)
    assert code == 0, pairs
    code, rows = plan("--config", "meta_rm.py:2b", "--topology", "h100:8")
    assert code == 0, rows
    update = "activations and scratch"
    assert row(pairs, update)[-1] > 1.5 * row(rows, update)[-1]
    packing = ["--meta-rm.fitting.pack", "2048", "--meta-rm.fitting.device-batch", "4"]
    _, packed = plan("--config", "meta_rm.py:2b", "--topology", "h100:8", *packing)
    assert row(packed, update)[-1] < 0.5 * row(rows, update)[-1]


def test_a_rollout_is_cut_to_what_is_free():
    """By as many samples as the sampler itself would drop."""
    large = ["--engine.max-rows", "4096", "--rl.prompts", "1024"]
    _, free = plan("--config", "rl.py:2b", "--topology", "h100:8", *large)
    _, given = plan(
        "--config",
        "rl.py:2b",
        "--topology",
        "h100:8",
        *large,
        "--engine.cache-bytes",
        "1000000000000000",
    )
    assert row(free, "caches")[0] < row(given, "caches")[0]
    assert row(free, "total, of 74.5")[0] < 74.5


def test_whoever_only_samples_holds_the_weights_once():
    """RFT's rollout: decoding weights in place of the parameters; its training has these alone."""
    code, output = plan("--config", "rft.py:2b", "--topology", "h100:8", "--mesh.tensor", "1")
    assert code == 0, output
    weights = count_params(param_table(model_config("2b"))) * 2 / 2**30
    assert row(output, "decoding weights") == [pytest.approx(weights, abs=0.01)]
    assert row(output, "parameters") == [pytest.approx(2 * weights / 8, abs=0.01)]


def test_the_processor_that_plans_decides_nothing(monkeypatch):
    """Whether its CPU is fast in bfloat16 is not asked for devices that it stands in for."""
    monkeypatch.setattr(compute_dtype, "bfloat16_speedup", lambda: pytest.fail("measured a CPU"))
    run = PlannedRun(Setup(size="2b"), jax.devices()[:1], "H100", compiles=False)
    assert run.model.compute_dtype == "bfloat16"
    assert not DryPrograms(run.mesh).on_cpu and Programs(run.mesh).on_cpu


def test_what_does_not_fit_comes_with_advice():
    code, output = plan("--config", "rl.py:27b", "--topology", "l4:8")
    assert code == 2
    assert "It does not fit. What helps:" in output
    assert "--lora.rank 16" in output and "--rl.offload-reference" in output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "rl.py:2b"], "give --config NAME.py:SIZE and --topology"),
        (["--config", "rl.py:2b", "--topology", "v5e:99"], "give a TPU slice, one of v4, v5e"),
        (["--config", "rl.py:2b", "--topology", "h100"], "and how many, as in h100:8"),
        (
            ["--config", "rl.py:2b", "--topology", "x9:8"],
            "or a GPU, one of gh200, h200, h100-pcie, h1",
        ),
        (
            ["--config", "rl.py:2b", "--topology", "gpu"],
            "a TPU slice, one of v4, v5e, v5p, v6e and",
        ),
        (["--config", "rl.py:2b", "--topology", "h100:3", "--mesh.tensor=2"], "a multiple of 2"),
    ],
)
def test_mistakes(args, message):
    code, output = plan(*args)
    assert code == 1
    assert message in output and "Traceback" not in output


def test_devices_by_the_names_that_jax_gives_them():
    found = [find_device(name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200")]
    assert [device and device.memory for device in found] == [80e9, 141e9]
    found = [find_device(name) for name in ("TPU v5 lite", "TPU v5p")]
    assert [device and device.flops for device in found] == [197e12, 459e12]
    assert find_device("cpu") is None


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_recipe_is_compiled_for_a_slice_that_is_not_there():
    code, output = plan("--config", "rl.py:2b", "--topology", "v5p:2x2x1")
    assert code in (0, 2), output
    assert row(output, "caches")[0] > 0 and "collectives" in output and "compiled in" in output
