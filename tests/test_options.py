"""Every number of every recipe is checked before anything starts; help, and numbers of a run."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

from grm_jax import options, plan, recipes, train
from grm_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("sft.py", "rft.py", "rl.py", "meta_rm.py", "scalar_rm.py", "spct.py")


def numeric(kind: type) -> set[tuple[str, str]]:
    """(dataclass, field) of each field that is declared as a number, below `kind`."""
    found = set()
    for field in dataclasses.fields(kind):
        default = field.default
        if dataclasses.is_dataclass(default):
            found |= numeric(type(default))
        elif any(part.strip() in ("int", "float") for part in str(field.type).split("|")):
            found.add((kind.__name__, field.name))
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_every_number_has_a_range_and_every_recipe_is_within(name):
    for size in ("tiny", "2b", "27b"):
        recipe = recipes.load(f"{name}:{size}")
        options.check(recipe)
        for owner, field in numeric(type(recipe)):
            assert field in options.RANGES[owner], f"{owner}.{field} has no range"
        assert all(option.startswith("--") for option, *_ in options.numbers(recipe))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--checkpoint-every 0", "--checkpoint-every 0: give 1 or more"),
        ("--log-every 0", "--log-every 0: give 1 or more"),
        ("--rl.prompts 0", "--rl.prompts 0: give 1 or more"),
        ("--rl.group 1", "--rl.group 1: give 2 or more"),
        ("--rl.orders 0", "--rl.orders 0: give 1 or more"),
        ("--rl.train-groups 0", "--rl.train-groups 0: give 1 or more"),
        ("--rl.steps -1", "--rl.steps -1: give 1 or more"),
        ("--rl.optimizer.learning-rate -1", "--rl.optimizer.learning-rate -1.0: give 0 or more"),
        ("--rl.optimizer.b1 nan", "--rl.optimizer.b1 nan: give 0 to 1"),
        ("--length-buckets", "--length-buckets: give at least one number"),
        ("--length-buckets 72 32", "--length-buckets 72 32: give them in ascending order"),
        ("--prompt-buckets 0 4", "--prompt-buckets 0 4: give 1 or more"),
        ("--mesh.cpu-devices 0", "--mesh.cpu-devices 0: give 1 or more"),
        ("--mesh.tensor 0", "--mesh.tensor 0: give the number of devices"),
        ("--keep.latest 0", "--keep.latest 0: give 1 or more"),
        ("--seed -1", "--seed -1: give 0"),
        ("--world.train 0", "--world.train 0: give 1 or more"),
    ],
)
def test_a_number_out_of_range_is_named_as_it_was_typed(args, message, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert train.main(["--config", "rl.py", "--run-dir", str(run_dir), *args.split()]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said
    assert not run_dir.exists()


@pytest.mark.parametrize("main", [train.main, plan.main])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_comes_before_everything_else(main, flag, capsys):
    assert main([flag]) == 0
    said = capsys.readouterr().out
    assert "python -m grm_jax" in said and "rl.py" in said


def test_a_fault_of_a_recipe_keeps_its_traceback(tmp_path):
    """Only a size that a recipe does not have is the user's."""
    broken = tmp_path / "mine.py"
    broken.write_text("def get_config(size):\n    return {'tiny': {}}[size]['steps']\n")
    with pytest.raises(KeyError, match="steps"):
        recipes.load(str(broken))
    with pytest.raises(recipes.ConfigError, match="has no size 'huge'"):
        recipes.load(f"{broken}:huge")


def test_recipes_are_part_of_the_wheel():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert tool["targets"]["wheel"]["force-include"] == {"configs": "grm_jax/configs"}


def test_numbers_do_not_depend_on_the_shell():
    code = (
        "from grm_jax.train import setup_devices; setup_devices(1); import jax, jax.numpy as jnp;"
        "print(jnp.arange(2).dtype, jax.random.bits(jax.random.key(3), (2,)))"
    )

    def said(**variables: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
        return subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)

    odd = said(
        JAX_ENABLE_X64="1", JAX_DEFAULT_PRNG_IMPL="rbg", JAX_THREEFRY_PARTITIONABLE="0",
        JAX_NUMPY_DTYPE_PROMOTION="strict",
    )  # fmt: skip
    assert odd == said()


def test_a_backend_that_is_not_here_is_named(monkeypatch):
    def none():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", none)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match="no device of JAX_PLATFORMS='cuda' here"):
        train.first_device()


def test_paths_of_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    from grm_jax.parallel.options import MeshConfig
    from grm_jax.training.run import Run
    from grm_jax.training.setup import Setup

    assert Run(Setup(run_dir="~/r", mesh=MeshConfig(1, -1, 1))).directory == tmp_path / "r"
