"""The families beside Gemma-2 against transformers: eager attention, float32, random weights."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import family_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.model import heads, huggingface, transformer
from grm_jax.model.attention import attention, visible
from grm_jax.model.config import SIZES, ModelConfig
from grm_jax.model.families import FAMILIES
from grm_jax.model.families.declaration import Missing
from grm_jax.model.params import count_params, get_leaf, param_table
from grm_jax.model.storage import load_model, save_model

FAMILY_NAMES = list(family_models.CONFIGS)
TOLERANCE = 1e-4  # of a logit
LENGTH = 16
PACKING = [(9, 7), (3, 8, 5), (4, 10)]  # the last two of the third row are padding


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model of transformers, its folder, and the same parameters here."""

    theirs: Any
    folder: Any
    config: ModelConfig
    params: Any

    def logits(self, tokens: np.ndarray, **given: np.ndarray) -> np.ndarray:
        import torch

        tensors = {name: torch.as_tensor(np.asarray(value)) for name, value in given.items()}
        with torch.no_grad():
            return self.theirs(torch.as_tensor(tokens), **tensors).logits.float().numpy()


def randomize(model: Any) -> None:
    """Random weights everywhere, biases and norms, too."""
    import torch

    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.add_(0.4 * drawn)
            elif weight.ndim == 1:
                weight.copy_(0.5 * drawn)
            else:
                std = 0.6 if "embed" in name else 1.2 * weight[0].numel() ** -0.5
                weight.copy_(std * drawn)


@pytest.fixture(scope="module")
def make_pair(tmp_path_factory):
    """(family, num_labels=0) -> Pair; each is made once."""

    @functools.cache
    def make(family: str, num_labels: int = 0) -> Pair:
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("torch").set_num_threads(1)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        config = family_models.CONFIGS[family]
        more = {"num_labels": num_labels} if num_labels else {}
        model = getattr(transformers, family_models.CLASSES[family][2 if num_labels else 1])(
            family_models.hf_config(config, pad_token_id=0, attn_implementation="eager", **more)
        ).eval()
        randomize(model)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        loaded, params = huggingface.load(folder, num_labels=num_labels)
        assert loaded == config
        return Pair(model, folder, config, params)

    return make


@pytest.fixture(params=FAMILY_NAMES)
def pair(request, make_pair) -> Pair:
    return make_pair(request.param)


def draw(config: ModelConfig, rows: int) -> np.ndarray:
    return np.random.default_rng(7).integers(1, config.vocab_size, (rows, LENGTH))


@functools.partial(jax.jit, static_argnums=1)
def row_logits(params, config, tokens, positions, segments):
    """Logits [B, T, V] of packed rows; padding has a segment of its own."""
    hidden = transformer.encode_packed(params, config, tokens, positions, segments)
    return heads.logits(params, config, hidden)


def whole_rows(pair: Pair, tokens: np.ndarray, config: ModelConfig | None = None) -> np.ndarray:
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    zeros = np.zeros_like(tokens)
    return np.asarray(row_logits(pair.params, config or pair.config, tokens, positions, zeros))


def close(ours, theirs, tolerance: float = TOLERANCE) -> None:
    assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() <= tolerance


def test_logits_of_whole_packed_and_padded_rows(pair):
    tokens = draw(pair.config, len(PACKING))
    close(whole_rows(pair, tokens), pair.logits(tokens))
    positions, segments, pieces = np.zeros_like(tokens), np.full_like(tokens, 9), []
    for row, lengths in enumerate(PACKING):
        start = 0
        for number, length in enumerate(lengths):
            piece = (row, slice(start, start + length))
            positions[piece], segments[piece] = np.arange(length), number
            pieces.append(piece)
            start += length
    packed = row_logits(pair.params, pair.config, tokens, positions, segments)
    for piece in pieces:
        close(packed[piece], pair.logits(tokens[piece][None])[0])
    lengths = np.array([LENGTH, 5, 11])
    valid = np.arange(LENGTH) < lengths[:, None]
    hidden = jax.jit(transformer.encode, static_argnums=1)(
        pair.params, pair.config, tokens, lengths
    )
    theirs = pair.logits(np.where(valid, tokens, 0), attention_mask=valid.astype(int))
    close(heads.logits(pair.params, pair.config, hidden)[valid], theirs[valid])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_feature_shows_in_the_logits(family, make_pair):
    pair = make_pair(family)
    tokens = draw(pair.config, 1)
    right = whole_rows(pair, tokens)
    for change in family_models.CHANGES[family]:
        wrong = whole_rows(pair, tokens, pair.config.replace(**change))
        assert np.abs(wrong - right).max() > 3 * TOLERANCE, change


@functools.partial(jax.jit, static_argnums=1)
def decode(params, config, token, cache, position):
    """Logits of one token [B, 1] at `position`, and the cache with it in that slot."""

    def attend(q, k, v, kind, layer_input):
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, new, position, axis=1)
            for old, new in zip(layer_input, (k, v), strict=True)
        )
        slots = jnp.broadcast_to(jnp.arange(LENGTH), (keys.shape[0], LENGTH))
        # Slots not yet written lie after `position`: causality hides them.
        mask = visible(jnp.full(token.shape, position), slots, window=config.window(kind))
        return attention(q, keys, values, mask, softcap=config.attn_softcap), (keys, values)

    positions = jnp.full(token.shape, position)
    hidden, cache = transformer.forward(params, config, token, positions, attend, cache)
    return heads.logits(params, config, hidden), cache


def test_cached_equals_uncached(pair):
    """Token by token, past the window, as one pass over the whole row."""
    config, tokens = pair.config, draw(pair.config, 2)
    empty = jnp.zeros((2, LENGTH, config.num_kv_heads, config.head_dim))
    cache: Any = [dict.fromkeys(slots, (empty, empty)) for slots in config.blocks]
    parts = []
    for at in range(LENGTH):
        logits, cache = decode(pair.params, config, tokens[:, at : at + 1], cache, at)
        parts.append(logits)
    close(jnp.concatenate(parts, axis=1), pair.logits(tokens))


@functools.partial(jax.jit, static_argnums=1)
def gradient(params, config, tokens):
    def loss(params):
        lengths = jnp.full(tokens.shape[0], tokens.shape[1])
        hidden = transformer.encode(params, config, tokens, lengths)
        logprobs, _ = heads.token_logprobs(
            params, config, hidden[:, :-1], tokens[:, 1:], temperature=1.0, chunk=8
        )
        return -logprobs.mean()

    return jax.grad(loss)(params)


def in_layout(spec, leaf, index: int | None) -> np.ndarray:
    """One tensor of a parameter in Hugging Face's layout."""
    leaf = np.asarray(leaf) if index is None else np.asarray(leaf)[index]
    return leaf.reshape(spec.hf_shape[::-1]).T if spec.hf_transposed else leaf


def test_gradients_are_those_of_transformers(pair):
    import torch

    tokens = draw(pair.config, 2)
    ours = gradient(pair.params, pair.config, tokens)
    model = copy.deepcopy(pair.theirs)
    ids = torch.as_tensor(tokens)
    model(ids, labels=ids).loss.backward()
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}
    for spec in param_table(pair.config):
        for index, name in spec.hf_names():
            found = in_layout(spec, get_leaf(ours, spec.path), index)
            np.testing.assert_allclose(found, theirs.pop(name), rtol=2e-4, atol=3e-6, err_msg=name)
    assert not theirs


def test_bfloat16_is_as_near_as_transformers_bfloat16(pair):
    """Our error is no larger than twice theirs."""
    import torch

    tokens = draw(pair.config, 3)
    exact = pair.logits(tokens)
    low = copy.deepcopy(pair.theirs).to(torch.bfloat16)
    with torch.no_grad():
        theirs = low(torch.as_tensor(tokens)).logits.float().numpy()
    ours = whole_rows(pair, tokens, pair.config.replace(compute_dtype="bfloat16"))
    assert np.abs(ours - exact).mean() < 2 * np.abs(theirs - exact).mean()
    assert np.abs(ours - exact).max() > 1e-3  # it was bfloat16


@pytest.mark.parametrize("labels", [0, 1], ids=["language model", "classifier"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_exports_load_in_transformers(family, labels, make_pair, tmp_path):
    """Import, model directory, export: the same tensors, all keys matched, the same logits."""
    import torch
    import transformers

    pair = make_pair(family, labels)
    save_model(tmp_path / "own", pair.config, pair.params)
    config, params = load_model(tmp_path / "own")
    assert config == pair.config
    huggingface.save(tmp_path / "out", config, params, pad_id=0 if labels else None)
    auto = "AutoModelForSequenceClassification" if labels else "AutoModelForCausalLM"
    model, info = getattr(transformers, auto).from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values())
    assert type(model).__name__ == family_models.CLASSES[family][2 if labels else 1]
    tokens = torch.as_tensor(draw(config, 2))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, pair.theirs(tokens).logits)
    again, _ = huggingface.load(tmp_path / "out", num_labels=labels)
    assert again == config
    if labels:
        lengths = np.full(2, LENGTH)
        hidden = transformer.encode(pair.params, pair.config, np.asarray(tokens), lengths)
        close(heads.scalar(pair.params, hidden, jnp.asarray(lengths)[:, None] - 1)[:, 0],
              pair.logits(np.asarray(tokens)))  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_absent_keys_have_the_values_of_transformers(name):
    """Those that are taken, and those that the message for a missing key names."""
    transformers = pytest.importorskip("transformers")
    family = FAMILIES[name]
    kind = "Gemma2Config" if name == "gemma2" else family_models.CLASSES[name][0]
    theirs = getattr(transformers, kind)()
    for number in family.numbers:
        said = number.default
        said = said.assumed if isinstance(said, Missing) else said
        if not callable(said):
            assert getattr(theirs, number.key) == said, number.key
    assert theirs.tie_word_embeddings == family.tied
    ropes = theirs.rope_parameters
    nested = {"global": "full_attention", "local": "sliding_attention"}
    for layers, theta in family.thetas.items():
        assert ropes.get(nested[layers], ropes)["rope_theta"] == theta


@pytest.mark.parametrize("size", [name for f in FAMILIES.values() for name in f.sizes][3:])
def test_released_sizes_have_the_names_and_shapes_of_transformers(size):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = SIZES[size]
    with torch.device("meta"):
        model = getattr(transformers, family_models.CLASSES[config.family][1])(
            family_models.hf_config(config)
        )
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
    table = param_table(config)
    assert {name: spec.hf_shape for spec in table for _, name in spec.hf_names()} == theirs
    assert count_params(table) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("layout", ["published", "transformers 5"])
def test_the_text_model_of_a_multimodal_checkpoint(layout, make_pair, tmp_path):
    """Both ways in which transformers has named its tensors; the vision parts are left out."""
    import json

    from safetensors.numpy import load_file, save_file

    pair = make_pair("gemma3_text")
    begins = "language_model.model." if layout == "published" else "model.language_model."
    vision = "" if layout == "published" else "model."
    tensors = {
        begins + name.removeprefix("model."): value
        for name, value in load_file(pair.folder / "model.safetensors").items()
    }
    for name in ("vision_tower.encoder.weight", "multi_modal_projector.mm_soft_emb_norm.weight"):
        tensors[vision + name] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((pair.folder / "config.json").read_text())
    outer = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {k: v for k, v in text.items() if k not in ("architectures", "dtype")},
        "vision_config": {"model_type": "siglip_vision_model"},
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(outer))
    config, params = huggingface.load(tmp_path)
    assert config == pair.config.replace(dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, params, pair.params)
    with pytest.raises(huggingface.CheckpointError, match="text_config is None"):
        (tmp_path / "config.json").write_text(json.dumps(outer | {"text_config": None}))
        huggingface.load(tmp_path)
