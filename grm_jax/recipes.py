"""Recipes: a small Python file says what a run does, and the command line changes it.

A recipe file defines `get_config(size: str) -> Recipe` for one of the recipe classes below:

    --config rl.py          get_config("tiny"), the embedded default that a CPU runs
    --config rl.py:27b      get_config("27b"), the paper's

The file is looked for as given and then in `configs/`. What was used is written to the run
directory. A run is only resumed with a recipe that says the same; fields declared with `how` may
change. What a recipe may need of the package can be imported from here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import tyro

from grm_jax.critique.template_set import TemplateConfig
from grm_jax.files import expanded
from grm_jax.judge.about import JudgeDefaults
from grm_jax.parallel.options import MeshConfig
from grm_jax.sampler.draw import SamplingConfig
from grm_jax.sampler.plan import EngineConfig
from grm_jax.training.evaluation import Evaluation
from grm_jax.training.meta_rm import MetaRM
from grm_jax.training.optimizer import OptimizerConfig
from grm_jax.training.rft import RFT
from grm_jax.training.rl import RL
from grm_jax.training.scalar_rm import ScalarRM
from grm_jax.training.setup import ConfigError, Fitting, GuardConfig, KeepConfig, Setup
from grm_jax.training.sft import SFT
from grm_jax.training.spct import Road

__all__ = [
    "RFT",
    "RL",
    "SFT",
    "ConfigError",
    "EngineConfig",
    "Evaluation",
    "Fitting",
    "GuardConfig",
    "JudgeDefaults",
    "KeepConfig",
    "MeshConfig",
    "MetaRM",
    "MetaRMRecipe",
    "OptimizerConfig",
    "RFTRecipe",
    "RLRecipe",
    "Recipe",
    "SFTRecipe",
    "SPCTRecipe",
    "SamplingConfig",
    "ScalarRM",
    "ScalarRMRecipe",
    "Setup",
    "TemplateConfig",
    "load",
    "names",
]  # fmt: skip

# Beside the package in a clone, in the package where it was installed without one.
_PLACES = (Path(__file__).resolve().parent.parent / "configs", Path(__file__).parent / "configs")
CONFIG_DIR = next((place for place in _PLACES if (place / "spct.py").is_file()), _PLACES[0])

SharedSetup = Annotated[Setup, tyro.conf.arg(name="")]
Init = Annotated[str | None, tyro.conf.arg(metavar="PATH")]


@dataclasses.dataclass(frozen=True)
class SFTRecipe:
    setup: SharedSetup = Setup()
    sft: SFT = SFT()


@dataclasses.dataclass(frozen=True)
class RFTRecipe:
    setup: SharedSetup = Setup()
    rft: RFT = RFT()
    init: Init = None
    """Checkpoint to start from instead of this run's supervised stage."""


@dataclasses.dataclass(frozen=True)
class RLRecipe:
    setup: SharedSetup = Setup()
    rl: RL = RL()
    init: Init = None
    """Checkpoint to start from (and to stay near) instead of this run's RFT stage."""


@dataclasses.dataclass(frozen=True)
class MetaRMRecipe:
    setup: SharedSetup = Setup()
    meta_rm: MetaRM = MetaRM()
    init: Init = None
    """Checkpoint of the GRM to be guided instead of this run's RL stage."""


@dataclasses.dataclass(frozen=True)
class ScalarRMRecipe:
    setup: SharedSetup = Setup()
    scalar_rm: ScalarRM = ScalarRM()
    init: Init = None
    """Checkpoint to start from instead of `scalar_rm.start`."""


@dataclasses.dataclass(frozen=True)
class SPCTRecipe(Road):
    """The whole road."""

    setup: SharedSetup = Setup()


Recipe = SFTRecipe | RFTRecipe | RLRecipe | MetaRMRecipe | ScalarRMRecipe | SPCTRecipe


def load(spec: str) -> Recipe:
    """The recipe that `--config` names: `file.py` or `file.py:size`.

    Raises ConfigError when the file is not found, defines no `get_config`, or rejects the size.
    """
    name, _, size = spec.partition(":")
    candidates = [expanded(name), CONFIG_DIR / name]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise ConfigError(f"{name}: no such recipe, here or in {CONFIG_DIR}; there are {names()}")
    module_spec = importlib.util.spec_from_file_location(f"grm_jax_recipe_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    # As for a script: a recipe may import what lies beside it (configs/_shared.py).
    sys.path.insert(0, str(path.resolve().parent))
    try:
        module_spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise ConfigError(f"{path}: defines no get_config(size); see configs/rl.py")
    size = size or "tiny"
    try:
        return get_config(size)
    except KeyError as error:
        if error.args != (size,):  # a fault of the recipe's own
            raise
        raise ConfigError(f"{path}: has no size {error}; try tiny, 2b, 9b or 27b") from error


def names() -> str:
    """The recipes that come with the package."""
    return ", ".join(sorted(path.name for path in CONFIG_DIR.glob("[!_]*.py")))
