"""Recipes: a small Python file says what a run does, and options of the command line change it.

A recipe file defines `get_config(size: str) -> Recipe` for one of the recipe classes below:

    --config rl.py                        get_config("tiny"), the embedded default on a CPU
    --config rl.py:27b                    get_config("27b"), the paper's
    --config rl.py:27b,group=8,lr=1e-6    get_config("27b", group=8, lr=1e-6)

Named arguments are for a choice that changes several fields at once, and for fields that are
changed often. A recipe declares them as keyword-only parameters of `get_config`, each with a
default and a type: int, float, bool or str, or one of these or None. Every field is an option of
the command line as well (`--rl.kl-coef 0.02`); options are applied after the recipe has been made.

The file is looked for as given, and then in `configs/`. The recipe as used is written to the run
directory. A run is only resumed with an equal recipe, except that fields declared with `how` may
change. Everything of the package that a recipe needs can be imported from here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from grm_jax.critique.template_set import TemplateConfig
from grm_jax.files import expanded
from grm_jax.judge.request import JudgeDefaults
from grm_jax.model.config import SIZES
from grm_jax.parallel.options import MeshConfig
from grm_jax.sampler.options import EngineConfig, SamplingConfig
from grm_jax.training.options import (
    RFT,
    RL,
    SFT,
    ColdStart,
    Evaluation,
    Fitting,
    MetaRM,
    OptimizerConfig,
    Pipeline,
    ScalarRM,
)
from grm_jax.training.setup import ConfigError, GuardConfig, HeldOutConfig, KeepConfig, Setup

__all__ = [
    "RFT",
    "RL",
    "SFT",
    "ColdStart",
    "ConfigError",
    "EngineConfig",
    "Evaluation",
    "Fitting",
    "GuardConfig",
    "HeldOutConfig",
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

_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
_BOOLS = {"true": True, "false": False}

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
class SPCTRecipe(Pipeline):
    """The whole pipeline."""

    setup: SharedSetup = Setup()


Recipe = SFTRecipe | RFTRecipe | RLRecipe | MetaRMRecipe | ScalarRMRecipe | SPCTRecipe


def load(spec: str) -> Recipe:
    """The recipe that `--config` names: `file.py`, `file.py:size` or `file.py:size,name=value,..`.

    Raises ConfigError when the file is not found, defines no `get_config`, has no such size, or
    does not take the named arguments.
    """
    name, _, arguments = spec.partition(":")
    candidates = [expanded(name), CONFIG_DIR / name]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise ConfigError(f"{name}: no such recipe, here or in {CONFIG_DIR}; there are {names()}")
    get_config = _get_config(path)
    first, *rest = arguments.split(",")
    # The size may be left out before named arguments.
    size, texts = ("", [first, *rest]) if "=" in first else (first, rest)
    size = size or "tiny"
    named = _named_arguments(path, get_config, texts)
    try:
        return get_config(size, **named)
    except KeyError as error:
        if error.args != (size,):  # not a missing size, but a mistake in the recipe
            raise
        raise ConfigError(
            f"{path}: has no size {error}; the sizes with a name are {', '.join(SIZES)}"
        ) from error


def _get_config(path: Path) -> Callable[..., Recipe]:
    """The function of that name in a recipe file, which is run. Raises ConfigError without one."""
    module_spec = importlib.util.spec_from_file_location(f"grm_jax_recipe_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    # As for a script: a recipe may import files beside it (configs/_shared.py).
    sys.path.insert(0, str(path.resolve().parent))
    try:
        module_spec.loader.exec_module(module)
    except SyntaxError as error:
        where = f"{error.filename or path}:{error.lineno or 1}"
        raise ConfigError(f"{where}: no Python: {error.msg}; correct the recipe") from error
    finally:
        sys.path.pop(0)
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise ConfigError(f"{path}: defines no get_config(size); see configs/rl.py")
    return get_config


def _named_arguments(
    path: Path, get_config: Callable[..., Recipe], texts: Sequence[str]
) -> dict[str, Any]:
    """`name=value` texts as the keyword-only parameters of `get_config`, each of its type.

    Raises ConfigError for a text of another form, a name that is not declared or comes twice, a
    value of another type, and a parameter without a default that is not given.
    """
    # Annotations are evaluated where a type is needed: only then need they be there at run time.
    signature = inspect.signature(get_config, eval_str=bool(texts))
    parameters = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    named: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{path}: {text!r} after the size; give NAME=VALUE, as in group=8")
        if not parameters:
            raise ConfigError(
                f"{path}: takes no named arguments, and {text} is one; give the option of the "
                "field instead (--help lists them)"
            )
        if name not in parameters:
            listed = ", ".join(f"{n} ({_kind(path, p).__name__})" for n, p in parameters.items())
            raise ConfigError(f"{path}: has no argument {name!r}; it has {listed}")
        if name in named:
            raise ConfigError(f"{path}: {name} is given twice; give it once")
        named[name] = _value(path, text, value, _kind(path, parameters[name]))
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in named:
            raise ConfigError(f"{path}: needs {name}=VALUE, as in {path.name}:tiny,{name}=VALUE")
    return named


def _kind(path: Path, parameter: inspect.Parameter) -> type:
    """The type that a named argument's text is converted to; it is T for `T | None`."""
    kind = parameter.annotation
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        parts = [part for part in typing.get_args(kind) if part is not types.NoneType]
        kind = parts[0] if len(parts) == 1 else kind
    if kind not in _KINDS:
        raise ConfigError(
            f"{path}: the type of get_config's argument {parameter.name} is to be int, float, bool "
            "or str, or one of these or None"
        )
    return kind


def _value(path: Path, argument: str, text: str, kind: type) -> Any:
    """The text as a value of the type. Raises ConfigError where it is none."""
    try:
        return _BOOLS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{path}: {argument}: give {_KINDS[kind]}") from error


def names() -> str:
    """The recipes that come with the package."""
    return ", ".join(sorted(path.name for path in CONFIG_DIR.glob("[!_]*.py")))
