"""The table of parameters against what transformers builds, and what is derived from it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.model.config import SIZES, model_config
from grm_jax.model.params import (
    abstract_params,
    build_tree,
    count_params,
    get_leaf,
    init_params,
    param_table,
)

COUNTS = {"2b": 2_614_341_888, "9b": 9_241_705_984, "27b": 27_227_128_320}


@pytest.mark.parametrize("size", COUNTS)
def test_names_shapes_and_counts_are_those_of_transformers(size, hf_config):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = model_config(size)
    with torch.device("meta"):
        causal = transformers.Gemma2ForCausalLM(hf_config(config))
        theirs = {name: tuple(p.shape) for name, p in causal.named_parameters()}
    table = param_table(config)
    ours = {name: spec.hf_shape for spec in table for _, name in spec.hf_names()}
    assert ours == theirs
    assert count_params(table) == COUNTS[size] == sum(p.numel() for p in causal.parameters())


def test_scalar_head_names_and_shapes(hf_config):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = model_config("tiny")
    with torch.device("meta"):
        model = transformers.Gemma2ForSequenceClassification(hf_config(config, num_labels=1))
        theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
    table = param_table(config, num_labels=1)
    assert {name: spec.hf_shape for spec in table for _, name in spec.hf_names()} == theirs


@pytest.mark.parametrize("size", SIZES)
def test_paths_are_unique_and_axes_fit_shapes(size):
    table = param_table(model_config(size), num_labels=1)
    assert len({spec.path for spec in table}) == len(table)
    names = [name for spec in table for _, name in spec.hf_names()]
    assert len(set(names)) == len(names)
    for spec in table:
        assert len(spec.axes) == len(spec.shape), spec.path
        # import and export take the summed-over dimensions to be the leading ones of a layer
        first = int(spec.stacked)
        assert spec.inputs == tuple(range(first, first + len(spec.inputs))), spec.path


def test_initialisation_has_the_declared_spread():
    table = param_table(model_config("tiny"), num_labels=1)
    init = jax.jit(lambda key: init_params(table, key, jnp.bfloat16))
    params, again, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    for spec in table:
        leaf = np.asarray(get_leaf(params, spec.path), np.float32)
        assert leaf.shape == spec.shape and get_leaf(params, spec.path).dtype == jnp.bfloat16
        assert (leaf == np.asarray(get_leaf(again, spec.path), np.float32)).all()
        if spec.init_std:
            assert leaf.std() == pytest.approx(spec.init_std, rel=0.05), spec.path
            assert (leaf != np.asarray(get_leaf(other, spec.path), np.float32)).any()
        else:
            assert not leaf.any()
    starts = [np.asarray(get_leaf(params, s.path)).ravel()[:50] for s in table if s.init_std]
    assert len({start.tobytes() for start in starts}) == len(starts)  # no key is used twice
    assert jax.tree.structure(params) == jax.tree.structure(abstract_params(table))


def test_get_leaf_names_the_path_that_is_not_there():
    params = build_tree(param_table(model_config("tiny")), lambda spec: spec.shape)
    with pytest.raises(KeyError, match="no parameter blocks/middle"):
        get_leaf(params, ("blocks", "middle", "q"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_layers": 1},
            "num_layers=1 is less than one repetition of the pattern local, global",
        ),
        ({"num_kv_heads": 3}, "no multiple of num_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
    ],
)
def test_config_refuses_impossible_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        model_config("tiny").replace(**change)


def test_unknown_size_lists_the_known():
    with pytest.raises(ValueError, match="choose one of tiny, tiny_half, tiny_double, 2b, 9b, 27b"):
        model_config("7b")
