"""What the pipeline refuses before its first stage begins."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from grm_jax import recipes
from grm_jax.training import spct
from grm_jax.training.setup import ConfigError


@pytest.mark.parametrize(
    ("stage", "options", "words"),
    [
        ("rl", {"vote": 1.0, "group": 32}, "--rl.group is 32"),
        ("meta_rm", {"start": "scalar_rm"}, "train the scalar RM first"),
    ],
)
def test_options_that_a_later_stage_could_not_use(tmp_path, stage, options, words):
    recipe = recipes.load("spct.py")
    assert isinstance(recipe, recipes.SPCTRecipe)
    changed = dataclasses.replace(getattr(recipe, stage), **options)
    run = SimpleNamespace(directory=tmp_path)
    with pytest.raises(ConfigError, match=words):
        spct.check_records(run, dataclasses.replace(recipe, **{stage: changed}))
