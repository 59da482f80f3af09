"""Which packages a machine lacks."""

from __future__ import annotations

import tomllib
from pathlib import Path

import wheels
from packaging.requirements import Requirement

HAVE = """
jax==0.11.2
Sentence_Piece==0.2.2
huggingface_hub==1.33.0   # a comment
flax
torch @ file:///wheels/torch-2.11.0.whl
numpy 2.5.2
"""


def test_lines_of_pip_list():
    assert wheels.read_have(HAVE) == {
        "jax": "0.11.2", "sentence-piece": "0.2.2", "huggingface-hub": "1.33.0", "flax": "",
        "torch": "", "numpy": "2.5.2",
    }  # fmt: skip


def test_what_is_missing_or_too_old_is_wanted():
    have = wheels.read_have(HAVE)
    asked = [
        "jax>=0.10,<0.13", "sentence-piece>=0.2.3", "huggingface-hub<3", "flax>=0.12", "grain>=0.2",
        'tomli>=2; python_version < "3.11"', "numpy>=3",
    ]  # fmt: skip
    found = wheels.wanted([Requirement(text) for text in asked], have, "3.12")
    assert [one.name for one in found] == ["sentence-piece", "grain", "numpy"]


def test_other_versions_are_brought_and_the_same_one_is_not():
    have = {"a": "1.0", "b": ""}
    assert not wheels.lacks("a", "1.0", have) and wheels.lacks("a", "1.1", have)
    assert not wheels.lacks("b", "1.0", have) and wheels.lacks("c", "1.0", have)


def test_the_projects_own_requirements_are_read():
    names = {one.name for one in wheels.project_requirements()}
    content = tomllib.loads((Path(wheels.__file__).parents[2] / "pyproject.toml").read_text())
    assert {"jax", "grain", "tyro", "sentencepiece"} <= names
    assert len(names) == len(content["project"]["dependencies"])
