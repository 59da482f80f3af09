"""A small model to judge with."""

from __future__ import annotations

from pathlib import Path

import pytest

from grm_jax.checkpoint import load_arrays  # noqa: F401  (orbax is read once, not in a test)
from grm_jax.critique.template_set import TemplateConfig, Templates
from grm_jax.data.synthetic_files import build_tokenizer
from grm_jax.judge.about import About
from grm_jax.judge.request import JudgeDefaults
from grm_jax.model.config import ModelConfig
from grm_jax.model.params import init_params, param_table
from grm_jax.model.storage import save_model
from grm_jax.sampler.options import EngineConfig


@pytest.fixture(scope="session")
def model(small) -> ModelConfig:
    return small.replace(num_layers=2)


@pytest.fixture(scope="session")
def templates() -> TemplateConfig:
    return TemplateConfig("compact", "compact_single", "compact_meta")


@pytest.fixture(scope="session")
def engine() -> EngineConfig:
    return EngineConfig(max_rows=16, page=16, prefill_tokens=64, chunk=8, min_lanes=8)


@pytest.fixture(scope="session")
def folder(model, templates, engine, tmp_path_factory) -> Path:
    """A model folder with random weights."""
    import jax

    tokenizer = build_tokenizer()
    config = model.replace(vocab_size=tokenizer.vocab_size, max_position=64)
    root = tmp_path_factory.mktemp("judge") / "model"
    save_model(root, config, init_params(param_table(config), jax.random.key(0), "float32"))
    tokenizer.save(root)
    About(
        templates=Templates.load(templates), engine=engine,
        judge=JudgeDefaults(temperature=1.0, max_new_tokens=12),
    ).write(root)  # fmt: skip
    return root


@pytest.fixture(scope="module")
def judge(model, templates, engine, one_device):
    """Random weights, with a meta RM and a scalar RM."""
    import jax

    from grm_jax.critique import Template
    from grm_jax.judge.judge import Judge
    from grm_jax.judge.meta import MetaRM
    from grm_jax.judge.scalar import ScalarRM

    tokenizer = build_tokenizer()
    config = model.replace(vocab_size=tokenizer.vocab_size, max_position=96)
    params = init_params(param_table(config), jax.random.key(0), "float32")
    head = init_params(param_table(config, num_labels=1), jax.random.key(1), "float32")
    return Judge(
        config, params, tokenizer, one_device, templates=templates, engine=engine,
        meta=MetaRM(config, head, Template.load("compact_meta"), (96,)),
        scalar=ScalarRM(config, head, (96,), tokenizer),
        fingerprint=lambda: "abc",
    )  # fmt: skip


@pytest.fixture(scope="module")
def session(judge):
    return judge.session(longest_prompt=64, max_new_tokens=12, samples=8, expected=True)
