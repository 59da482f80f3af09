"""Scalar scores of rows, whatever they are batched with."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from grm_jax.data.collate import Example
from grm_jax.judge import scalar as scoring
from grm_jax.judge.scalar import score_examples
from grm_jax.model.params import param_table
from grm_jax.model.storage import param_shardings


@pytest.fixture(scope="module")
def weights(model, make_params):
    return make_params(model, 2, num_labels=1)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    rng = np.random.default_rng(0)
    lengths = [3, 12, 7, 16, 5, 8, 2]
    return [Example((4,), tuple(rng.integers(4, 40, n - 1).tolist())) for n in lengths]


def test_scores_do_not_depend_on_batches_and_buckets(model, weights, examples, one_device, mesh_of):
    alone = [score_examples(weights, model, [e], (16,), 1, one_device).item() for e in examples]
    assert np.std(alone) > 0.1
    for buckets, size in (((16,), 4), ((8, 16), 4), ((32,), 2)):
        found = score_examples(weights, model, examples, buckets, size, one_device)
        np.testing.assert_allclose(found, alone, atol=1e-5)
    mesh = mesh_of(2, 2, 1)
    put = jax.device_put(weights, param_shardings(param_table(model, num_labels=1), mesh))
    found = score_examples(put, model, examples, (16,), 4, mesh)
    np.testing.assert_allclose(found, alone, atol=1e-5)


def test_a_device_scores_so_many_tokens_at_once(
    model, weights, examples, one_device, mesh_of, monkeypatch
):
    whole = score_examples(weights, model, examples, (8, 16), 8, one_device)
    shapes, program = set(), scoring._program

    def watched(config, mesh):
        score = program(config, mesh)

        def call(params, tokens, lengths):
            shapes.add(tokens.shape)
            return score(params, tokens=tokens, lengths=lengths)

        return call

    monkeypatch.setattr(scoring, "_program", watched)
    found = score_examples(weights, model, examples, (8, 16), 8, one_device, tokens=20)
    assert shapes == {(2, 8), (1, 16)}
    np.testing.assert_allclose(found, whole, atol=1e-5)
    # One row at least, and as many on each shard.
    mesh = mesh_of(2, 2, 1)
    put = jax.device_put(weights, param_shardings(param_table(model, num_labels=1), mesh))
    shapes.clear()
    found = score_examples(put, model, examples, (16,), 512, mesh, tokens=10)
    assert shapes == {(4, 16)}
    np.testing.assert_allclose(found, whole, atol=1e-5)


def test_rows_that_do_not_fit_are_an_error(model, weights, examples, one_device):
    with pytest.raises(ValueError, match=r"2 of 7 rows to score are longer than .* bucket 8"):
        score_examples(weights, model, examples, (8,), 4, one_device)
