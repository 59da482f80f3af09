"""The README's lines do what they say, against a server with the fake session."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

import grm_jax.serving

README = Path(grm_jax.serving.__file__).with_name("README.md").read_text(encoding="utf-8")
SHOWN = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


CURLS = [line for block in blocks("sh") for line in block.splitlines()]


@pytest.mark.parametrize("line", CURLS, ids=lambda line: line.split()[2].split("8000")[-1])
def test_curl(line, shared):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    line = line.replace(SHOWN, str(shared[1].base_url)) + " --fail-with-body --max-time 20"
    said = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    json.loads(said.stdout)


NEEDS = {"openrlhf": "torch", "verifiers": "verifiers", "nemo_gym": "nemo_gym"}


@pytest.mark.parametrize("text", blocks("python"), ids=lambda text: text.split()[1])
def test_python(text, shared, tmp_path, capsys):
    for name, module in NEEDS.items():
        if f"adapters.{name} " in text:
            pytest.importorskip(module)
    (tmp_path / "example.py").write_text(text.replace(SHOWN, str(shared[1].base_url)))
    runpy.run_path(str(tmp_path / "example.py"))
    assert bool(capsys.readouterr().out) == ("print(" in text)


def test_every_route_is_in_the_table_and_has_a_curl(shared):
    paths = shared[1].get("/openapi.json").json()["paths"]
    own = {"/health", "/ready", "/metrics", "/v1/models/{name}"}
    missing = [path for path in paths if path not in own and f"{path}`" not in README
               and f"{path}," not in README]  # fmt: skip
    assert not missing
    asked = " ".join(CURLS)
    for path in set(paths) - own:
        group = {
            "/v1/score": "/score", "/rerank": "/v1/rerank", "/v2/rerank": "/v1/rerank",
            "/seed_session": "/verify", "/aggregate_metrics": "/verify",
            "/reverify_mode": "/verify",
        }.get(path, path)  # fmt: skip
        assert f"8000{group}" in asked, path
