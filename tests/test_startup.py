"""Commands start at once: what takes long to load is loaded where it is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import grm_jax

ROOT = Path(grm_jax.__file__).parents[1]
HELP = (
    "train --help", "train --config rl.py --help", "train --config spct.py --help",
    "evaluate --help", "judge --help", "serve --help", "convert --help", "convert export --help",
    "plan --help", "plan --config rl.py:27b --topology v5e:8x8 --help",
)  # fmt: skip
SLOW = ("jax", "flax", "optax", "orbax", "grain", "scipy", "matplotlib", "transformers", "torch")


def test_help_loads_nothing_that_takes_long():
    code = (
        "import runpy, sys\n"
        "for command in sys.argv[1:]:\n"
        "    name, *sys.argv[1:] = command.split()\n"
        "    try:\n"
        "        runpy.run_module(f'grm_jax.{name}', run_name='__main__', alter_sys=True)\n"
        "    except SystemExit as exit:\n"
        "        assert not exit.code, command\n"
        f"    loaded = {set(SLOW)} & sys.modules.keys()\n"
        "    assert not loaded, f'{command} loads {loaded}'\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *HELP], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("usage: ") == len(HELP) - 2  # two print the recipes instead


# Trains, samples and judges as small as possible, and prints what became of the programs.
START = """
import collections, dataclasses, json, sys
import jax.monitoring
import pytest

from grm_jax import train
from grm_jax.judge import __main__ as judge
from grm_jax.model.config import SIZES
run = sys.argv[1]
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.split("/")[-1]]))
SIZES["tiny"] = dataclasses.replace(
    SIZES["tiny"], num_layers=2, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, hidden_dim=8
)
shared = [
    "--run-dir", run, "--log-every", "1", "--mesh.cpu-devices", "1", "--engine.max-rows", "16",
    "--world.cold-start", "20", "--world.train", "20", "--world.fresh", "2", "--world.shifted", "1",
    "--judge.max-new-tokens", "8",
]
assert train.main([
    "--config", "sft.py", *shared, "--sft.fitting.steps", "2", "--sft.fitting.batch-size", "4",
]) == 0
assert train.main([
    "--config", "rl.py", *shared, "--init", f"{run}/sft/model", "--rl.steps", "2",
    "--rl.prompts", "2", "--rl.group", "2", "--rl.train-groups", "None",
    "--rl.sampling.max-new-tokens", "8",
]) == 0
try:
    judge.main(["--model", f"{run}/rl/model", "--query", " sum 1 2", "--response", " 3", "-k", "2"])
except SystemExit:
    pass  # 3: a random model's critiques have no scores
with open(f"{run}/counts.json", "w") as file:
    json.dump(counts, file)
"""


def start(run: Path, programs: Path) -> dict[str, int]:
    """Counts of JAX's events of a process that trains and judges."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(programs)}
    run.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", START, str(run)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((run / "counts.json").read_text())


def losses(run: Path) -> list[list[float]]:
    """What both stages measured in each step, without times."""
    rows = [
        json.loads(line)
        for stage in ("sft", "rl")
        for line in (run / stage / "metrics.jsonl").read_text().splitlines()
    ]
    return [[row[name] for name in ("loss", "grad_norm")] for row in rows]


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path):
    first = start(tmp_path / "first", tmp_path / "programs")
    assert first["cache_misses"] > 40, "nothing is left out for being small"
    assert first["cache_misses"] + first["cache_hits"] == first["compile_requests_use_cache"]
    second = start(tmp_path / "second", tmp_path / "programs")
    assert second.get("cache_misses", 0) == 0
    assert second["cache_hits"] == second["compile_requests_use_cache"] > 40
    assert losses(tmp_path / "second") == losses(tmp_path / "first"), "programs from disk differ"
