"""Commands start at once: what takes long to load is loaded where it is used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
