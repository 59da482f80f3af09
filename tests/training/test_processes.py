"""Two processes of four devices each are one of eight: the same losses, rewards and parameters."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from grm_jax.model.storage import load_model

ROOT = Path(__file__).resolve().parents[2]
# Few and small; every stage's kind of step: completions, sampled groups, a scalar head.
COMMON = [
    "--world.train=48", "--world.cold-start=64", "--checkpoint-every=3", "--log-every=1",
    "--mesh.replica=2", "--mesh.fsdp=-1",
]  # fmt: skip
FITTING = ["fitting.steps=5", "fitting.batch-size=16", "fitting.device-batch=1"]
STAGES = {
    "sft": [f"--sft.{option}" for option in FITTING],
    "rl": [
        "--rl.steps=3", "--rl.prompts=8", "--rl.group=4", "--rl.device-batch=1",
        "--rl.train-groups=8", "--rl.sampling.max-new-tokens=12",
    ],
}  # fmt: skip


def start(stage: str, run_dir: Path, devices: int, process: int | None, port: int, *more: str):
    command = [sys.executable, "-m", "grm_jax.train", "--config", f"{stage}.py"]
    command += ["--run-dir", str(run_dir), f"--mesh.cpu-devices={devices}", *COMMON]
    command += [*STAGES[stage], *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    if process is not None:
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(process),
        }
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*processes: subprocess.Popen) -> list[str]:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    return outputs


def two(stage: str, run_dir: Path, *more: str) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return finish(*(start(stage, run_dir, 4, process, port, *more) for process in range(2)))


def curve(run_dir: Path, stage: str, *names: str) -> np.ndarray:
    lines = (run_dir / stage / "metrics.jsonl").read_text().splitlines()
    return np.asarray([[json.loads(line)[name] for name in names] for line in lines])


@pytest.mark.slow
def test_two_processes_are_one_of_eight_devices(tmp_path):
    outputs = two("sft", tmp_path / "two")
    gloo = re.compile(r"\[Gloo\]|connected (to|peer)")  # written in pieces, from several threads
    said = [
        [line for line in out.splitlines() if line and not gloo.search(line)] for out in outputs
    ]
    assert any("done" in line for line in said[0]) and not said[1], "the first alone speaks"
    finish(start("sft", tmp_path / "one", 8, None, 0))
    found, expected = (curve(tmp_path / n, "sft", "loss", "grad_norm") for n in ("two", "one"))
    assert found.shape == (5, 2)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    # Sampling, rewards and a policy update, from the same model.
    begin = f"--init={tmp_path / 'one' / 'sft' / 'model'}"
    two("rl", tmp_path / "two", begin)
    finish(start("rl", tmp_path / "one", 8, None, 0, begin))
    names = ("reward", "length", "loss", "kl", "grad_norm")
    found, expected = (curve(tmp_path / n, "rl", *names) for n in ("two", "one"))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-3, atol=1e-6)
    assert (curve(tmp_path / "two", "rl", "logprob_gap") < 1e-4).all()
    models = [load_model(tmp_path / n / "rl" / "model")[1] for n in ("two", "one")]
    embeds = [np.asarray(model["embed"]) for model in models]
    np.testing.assert_allclose(*embeds, atol=2e-3)
