"""Every message that names an option names one that its command has, as it is typed."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import grm_jax
from grm_jax import convert, recipes, serve
from grm_jax.evaluate_options import Arguments
from grm_jax.judge import __main__ as judge_command
from grm_jax.judge.request import ScoreOptions

ROOT = Path(grm_jax.__file__).parent
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
RECIPES = [
    recipes.load(f"{name}.py") for name in ("sft", "rft", "rl", "meta_rm", "scalar_rm", "spct")
]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:[-.][a-z0-9]+)*")
OF_OTHERS = {
    "--help",
    "--local-dir",
    "--repo-type",
    "--rm-url",
}  # of every command; of hf; of slime


def options(kind: Any, prefix: str = "--") -> Iterator[str]:
    """As `tyro` makes them of a dataclass: groups, fields, and the negative form of switches."""
    for field in dataclasses.fields(kind):
        value = getattr(kind, field.name) if not isinstance(kind, type) else field.default
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            below = prefix if field.name == "setup" else f"{prefix}{name}."
            yield below.rstrip(".")
            yield from options(value, below)
            continue
        yield f"{prefix}{name}"
        if isinstance(value, bool):
            yield f"{prefix}no-{name}"
            *group, last = f"{prefix}{name}".split(".")
            yield ".".join([*group, f"no-{last}"]) if group else f"--no-{name}"


TRAIN = {"--config", *(option for recipe in RECIPES for option in options(recipe))}
EVALUATE = {"-k", *options(Arguments)}
CONVERT = {
    option for kind in (convert.Import, convert.Export, convert.Random) for option in options(kind)
}
PLAN = {"--topology", *TRAIN}
JUDGE = {"-k", *options(judge_command.Arguments), *options(ScoreOptions)}
SERVE = {"-k", *options(serve.Arguments)}


COMMANDS = {
    "train": TRAIN,
    "evaluate": EVALUATE,
    "convert": CONVERT,
    "plan": PLAN,
    "judge": JUDGE,
    "serve": SERVE,
}
# Files whose messages one command alone can print; those of others may name any option.
OWNERS = {
    "train": ("training/", "recipes.py", "options.py", "train.py"),
    "evaluate": ("evaluate", "benchmarks/", "scoring/"),
    "convert": ("convert.py", "conversion.py"),
    "plan": ("plan.py", "parallel/topology.py"),
    "judge": ("judge/__main__.py", "judge/score_file.py"),
    "serve": ("serve.py", "serving/"),
}


def known(file: Path, text: str) -> set[str]:
    """The options that a message of a file may name: of its command, and of one that it spells."""
    owners = [name for name, starts in OWNERS.items() if file.as_posix().startswith(starts)]
    spelt = [name for name in COMMANDS if f"python -m grm_jax.{name} " in text]
    return set().union(*(COMMANDS[name] for name in [*(owners or COMMANDS), *spelt]))


def messages(file: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string of a file that is no docstring."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    documents = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if node in documents:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


@pytest.mark.parametrize("file", FILES, ids=str)
def test_options_in_messages_exist(file):
    for line, text in messages(file):
        missing = set(OPTION.findall(text)) - OF_OTHERS - known(file, text)
        assert not missing, f"{file}:{line}: {missing} in {text!r}"


def raised(file: Path) -> Iterator[tuple[int, str]]:
    """Line and text of the strings in errors that are made for users, and in the log."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if (called.endswith("Error") and called != "ValueError") or called.startswith("log."):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value


GROUPS = {option[2:].split(".")[0].replace("-", "_") for option in TRAIN if "." in option}
FIELDS = {o.rsplit(".", 1)[-1].lstrip("-").replace("-", "_") for o in TRAIN if "-" in o[3:]}
BARE = re.compile(
    rf"(?<![\w.-])(?:(?:{'|'.join(GROUPS)}|fitting|sampling|optimizer)\.[a-z]+[a-z_]*"
    rf"|{'|'.join(name for name in FIELDS - GROUPS if '_' in name)})(?![\w/])"
)
# What these check are not options alone: grm.json's fields, a request's, arguments of a function.
NOT_OPTIONS = ("judge/about.py", "judge/prepared.py", "judge/session.py", "sampler/options.py")


@pytest.mark.parametrize("file", [f for f in FILES if f.as_posix() not in NOT_OPTIONS], ids=str)
def test_options_are_named_as_they_are_typed(file):
    for line, text in raised(file):
        bare = [name for name in BARE.findall(text) if not name.endswith(".py")]
        assert not bare, f"{file}:{line}: {bare} in {text!r}"


def test_the_tables_hold_what_the_commands_have():
    assert {"--rl.sampling.max-new-tokens", "--meta-rm.no-rft-trajectories", "--base"} <= TRAIN
    assert {"--long-prompts", "--mesh.tensor", "--k-meta"} <= EVALUATE
    assert "--max-shard-size" in CONVERT and "--rl.prompt" not in TRAIN
    assert BARE.findall("raise length_buckets, rl.prompts=3") == ["length_buckets", "rl.prompts"]
