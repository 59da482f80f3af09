"""Probabilities of labels: against transformers, whatever they are batched with, and as prompts."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest

from grm_jax.checkpoint import load_arrays  # noqa: F401  (orbax is read once, not in a test)
from grm_jax.data.rows import DataError
from grm_jax.data.synthetic_files import build_tokenizer
from grm_jax.judge.about import About
from grm_jax.judge.judge import Judge
from grm_jax.judge.labels import LabelReader, LabelRow, label_logprobs
from grm_jax.judge.request import MOST_LABELS, LabelRequest
from grm_jax.judge.verdict import LabelLogprobs
from grm_jax.model import huggingface
from grm_jax.model.storage import save_model

BUCKETS = (8, 32)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def config(model, tokenizer):
    return model.replace(vocab_size=tokenizer.vocab_size)


@pytest.fixture(scope="module")
def params(config, make_params):
    return make_params(config, 5)


@pytest.fixture(scope="module")
def rows(config) -> list[LabelRow]:
    rng = np.random.default_rng(0)
    return [
        LabelRow(
            tuple(rng.integers(4, config.vocab_size, length).tolist()),
            tuple(rng.choice(config.vocab_size, labels, replace=False).tolist()),
        )
        for length, labels in ((3, 2), (8, 1), (31, 2), (9, 5), (1, 3), (20, 2), (5, 2))
    ]


@pytest.fixture(scope="module")
def folder(config, params, engine, tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("labels") / "model"
    save_model(root, config, params)
    tokenizer.save(root)
    About(engine=engine).write(root)
    return root


@pytest.fixture(scope="module")
def reference(config, params, rows, tmp_path_factory) -> list[np.ndarray]:
    """What transformers says, in float32."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("labels") / "transformers"
    huggingface.save(root, config, params)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        root, attn_implementation="eager", dtype="float32"
    ).eval()
    with torch.no_grad():
        logprobs = [
            model(torch.tensor([row.prompt])).logits[0, -1].log_softmax(-1)[list(row.labels)]
            for row in rows
        ]
    return [values.numpy() for values in logprobs]


def close(found, expected) -> None:
    assert [len(row) for row in found] == [len(row) for row in expected]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=1e-4)


def test_log_probabilities_are_those_of_transformers(
    config, params, rows, reference, one_device, mesh_of
):
    assert np.std(np.concatenate(reference)) > 1
    close(label_logprobs(params, config, rows, BUCKETS, 4, one_device), reference)
    close(label_logprobs(params, config, rows, BUCKETS, 4, mesh_of(2, 2, 1)), reference)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 2)])
def test_a_judges_labels_are_those_of_its_weights(folder, rows, reference, mesh_of, mesh):
    """The sampler has taken them, in a layout of its own."""
    judge = Judge.load(folder, mesh=mesh_of(*mesh))
    assert isinstance(judge.params["blocks"], tuple)
    close(judge.labels.logprobs(rows), reference)


def test_results_have_the_same_bits_alone_and_among_others(config, params, rows, one_device):
    def read(rows):
        return label_logprobs(params, config, rows, BUCKETS, 4, one_device)

    together = read(rows)
    for row, values in zip(rows, together, strict=True):
        (alone,) = read([row])
        assert alone.tobytes() == values.tobytes()
    assert read([]) == []


@pytest.fixture(scope="module")
def reader(config, params, tokenizer, one_device) -> LabelReader:
    return LabelReader(config, params, tokenizer, one_device, BUCKETS)


def test_prompts_are_made_as_vllm_makes_them(reader, tokenizer):
    """Query and item are encoded one by one; the query alone gets what begins a text."""
    begins = copy.copy(tokenizer)
    begins.begin_ids = (tokenizer.bos_id,)  # the embedded world's puts nothing before a text
    reader = dataclasses.replace(reader, tokenizer=begins)
    query, items = " larger 1 2", (" anna", " ben 1")
    q, (a, b) = tuple(tokenizer.encode(query)), (tuple(tokenizer.encode(item)) for item in items)
    bos = (tokenizer.bos_id,)

    def prompts(query=query, items=items, **how):
        rows = reader.rows(LabelRequest(query, items, (7, 9), **how))
        assert all(row.labels == (7, 9) for row in rows)
        return [row.prompt for row in rows]

    assert prompts() == [bos + q + a, bos + q + b]
    assert prompts(item_first=True) == [a + bos + q, b + bos + q]
    assert prompts(special=False) == [q + a, q + b]
    assert prompts(query=q) == [q + a, q + b]
    assert prompts(items=(b, items[0])) == [bos + q + b, bos + q + a]
    control = tokenizer.decode([tokenizer.end_id], show_control=True)
    assert tokenizer.end_id not in prompts(items=(control,))[0], "a text has no control tokens"


def test_what_can_not_be_read_is_named(reader, config):
    for asked, field in (
        (LabelRequest(" sum", (" anna",), (config.vocab_size,)), "label_token_ids"),
        (LabelRequest(" sum", (" anna",), (-1,)), "label_token_ids"),
        (LabelRequest((10**30,), (" anna",), (1,)), "query"),
        (LabelRequest(" sum", (" anna", (4, -4)), (1,)), r"items\[1\]"),
        (LabelRequest(" sum", (" anna", " ben" * 96), (1,)), r"items\[1\]"),
        (LabelRequest("", ("",), (1,), special=False), r"items\[0\]"),
    ):
        with pytest.raises(DataError, match=f"^{field}: "):
            reader.rows(asked)
    for items, labels, field in (
        ((), (1,), "items"),
        (("a",), (), "label_token_ids"),
        (("a",), (1,) * (MOST_LABELS + 1), "label_token_ids"),
    ):
        with pytest.raises(DataError, match=f"^{field}: "):
            LabelRequest("q", items, labels)


def test_probabilities_of_the_vocabulary_or_among_the_labels():
    found = LabelLogprobs(((np.log(0.2), np.log(0.3)), (-2000.0, -2000.0)), 5)
    np.testing.assert_allclose(found.probabilities(among_labels=False)[0], (0.2, 0.3))
    np.testing.assert_allclose(found.probabilities(among_labels=True), [(0.4, 0.6), (0.5, 0.5)])
