"""The forward pass against transformers' Gemma-2: eager attention, float32, random weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.model import heads, transformer
from grm_jax.model.attention import attention, visible
from grm_jax.model.params import build_tree, get_leaf, param_table

TOLERANCE = 1e-4  # of a logit
LENGTH = 16  # every window is shorter


def close(ours, theirs, tolerance: float = TOLERANCE) -> None:
    assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() <= tolerance


def draw(rng, config, *shape: int) -> np.ndarray:
    return rng.integers(1, config.vocab_size, shape)


def test_logits(reference, our_logits, rng):
    tokens = draw(rng, reference.config, 3, LENGTH)
    close(our_logits(reference.params, reference.config, tokens), reference.logits(tokens))


@functools.partial(jax.jit, static_argnums=1)
def logits_with(params, config, tokens, constants):
    """Logits under other numeric constants, traced: one compilation for all of them."""
    config = config.replace(attention="reference", **constants)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    attend = transformer.self_attend(config, positions)
    hidden, _ = transformer.forward(params, config, tokens, positions, attend)
    return heads.logits(params, config, hidden)


def test_the_references_exercise_what_they_should(reference, rng):
    """Dropping a softcap, shifting the window or scaling by head_dim must show in the logits."""
    config, params = reference.config, reference.params
    tokens = draw(rng, config, 3, LENGTH)
    names = ("attn_softcap", "final_softcap", "sliding_window", "rope_theta", "norm_eps")
    right = {name: getattr(config, name) for name in names}
    want = reference.logits(tokens)
    close(logits_with(params, config, tokens, right), want)
    for change in (
        {"attn_softcap": 1e6},
        {"final_softcap": 1e6},
        {"sliding_window": config.sliding_window + 1},
        {"sliding_window": config.sliding_window - 1},
        {"rope_theta": config.rope_theta * 1.5},
        {"norm_eps": config.norm_eps * 100},
    ):
        wrong = logits_with(params, config, tokens, right | change)
        assert np.abs(wrong - want).max() > 3 * TOLERANCE, change
    ratio = (config.query_pre_attn_scalar / config.head_dim) ** 0.5
    blocks = {kind: p | {"q": p["q"] * ratio} for kind, p in params["blocks"].items()}
    wrong = logits_with(params | {"blocks": blocks}, config, tokens, right)
    assert np.abs(wrong - want).max() > 3 * TOLERANCE, "query_pre_attn_scalar"


def test_right_padding(reference, our_logits, rng):
    config, lengths = reference.config, np.array([LENGTH, 5, 11])
    tokens = draw(rng, config, 3, LENGTH)
    valid = np.arange(LENGTH) < lengths[:, None]
    theirs = reference.logits(np.where(valid, tokens, 0), attention_mask=valid.astype(int))
    # What stands in the padding does not matter.
    ours = our_logits(reference.params, config, tokens, valid=valid)
    close(ours[valid], theirs[valid])


def test_encode_is_right_padding(wide, our_logits, rng):
    config, lengths = wide.config, np.array([LENGTH, 5, 11])
    tokens = draw(rng, config, 3, LENGTH)
    valid = np.arange(LENGTH) < lengths[:, None]
    hidden = jax.jit(transformer.encode, static_argnums=1)(wide.params, config, tokens, lengths)
    logits = heads.logits(wide.params, config, hidden)
    close(logits[valid], our_logits(wide.params, config, tokens, valid=valid)[valid], 1e-5)


def test_left_padding(reference, our_logits, rng):
    config, lengths = reference.config, np.array([7, LENGTH, 12])
    tokens = draw(rng, config, 3, LENGTH)
    valid = np.arange(LENGTH) >= LENGTH - lengths[:, None]
    positions = np.where(valid, np.cumsum(valid, axis=1) - 1, 0)
    theirs = reference.logits(
        np.where(valid, tokens, 0), attention_mask=valid.astype(int), position_ids=positions
    )
    ours = our_logits(reference.params, config, tokens, positions=positions, valid=valid)
    close(ours[valid], theirs[valid])
    alone = reference.logits(tokens[:1, -7:])  # and padding is as if it was not there
    close(ours[0, -7:], alone[0])


def test_packed_segments_equal_each_sequence_alone(reference, our_logits, rng):
    """Three rows, packed differently; the last two of the third are padding."""
    config, packing = reference.config, [(9, 7), (3, 8, 5), (4, 10)]
    tokens = draw(rng, config, 3, LENGTH)
    positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
    pieces = []
    for row, lengths in enumerate(packing):
        start = 0
        for number, length in enumerate(lengths, start=1):
            piece = (row, slice(start, start + length))
            positions[piece], segments[piece] = np.arange(length), number
            pieces.append(piece)
            start += length
    ours = our_logits(
        reference.params, config, tokens, positions=positions, valid=segments > 0, segments=segments
    )
    for piece in pieces:
        close(ours[piece], reference.logits(tokens[piece][None])[0])


@functools.partial(jax.jit, static_argnums=1)
def prefill(params, config, tokens):
    """Logits of `tokens` [B, T], and each block's keys and values [B, T, K, h]."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    over_itself = transformer.self_attend(config, positions)

    def attend(q, k, v, kind, layer_input):
        out, _ = over_itself(q, k, v, kind, layer_input)
        return out, (k, v)

    hidden, emitted = transformer.forward(params, config, tokens, positions, attend)
    blocks = [
        jax.tree.map(lambda x, i=i: x[i], emitted["blocks"]) for i in range(config.num_blocks)
    ]
    return heads.logits(params, config, hidden), blocks


@functools.partial(jax.jit, static_argnums=1)
def decode(params, config, token, cache, position):
    """Logits of one token [B, 1] at `position`, and the cache with it in that slot."""

    def attend(q, k, v, kind, layer_input):
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, new, position, axis=1)
            for old, new in zip(layer_input, (k, v), strict=True)
        )
        slots = jnp.broadcast_to(jnp.arange(keys.shape[1]), (keys.shape[0], keys.shape[1]))
        window = config.window(kind)
        # Slots not yet written lie after `position`: causality hides them.
        mask = visible(positions, slots, window=window)
        return attention(q, keys, values, mask, softcap=config.attn_softcap), (keys, values)

    positions = jnp.full(token.shape, position)
    hidden, cache = transformer.forward(params, config, token, positions, attend, cache)
    return heads.logits(params, config, hidden), cache


def test_cached_equals_uncached(reference, rng):
    """Prefill, then token by token past the window, as one pass over the whole row."""
    config, first = reference.config, 6
    tokens = draw(rng, config, 2, LENGTH)
    logits, cache = prefill(reference.params, config, tokens[:, :first])
    room = ((0, 0), (0, LENGTH + 3 - first), (0, 0), (0, 0))
    cache = jax.tree.map(lambda x: jnp.pad(x, room), cache)
    parts = [logits]
    for at in range(first, LENGTH):
        logits, cache = decode(reference.params, config, tokens[:, at : at + 1], cache, at)
        parts.append(logits)
    close(jnp.concatenate(parts, axis=1), reference.logits(tokens))


def loss(params, config, tokens, remat):
    hidden = transformer.encode(
        params, config, tokens, jnp.full(tokens.shape[0], tokens.shape[1]), remat=remat
    )
    logprobs, _ = heads.token_logprobs(
        params, config, hidden[:, :-1], tokens[:, 1:], temperature=1.0, chunk=8
    )
    return -logprobs.mean()


loss_and_gradient = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 3))


def test_gradients_equal_those_of_transformers(wide, rng):
    """Every parameter's gradient, the tied embedding's two parts included."""
    torch = pytest.importorskip("torch")
    tokens = draw(rng, wide.config, 2, LENGTH)
    _, ours = loss_and_gradient(wide.params, wide.config, tokens, "none")
    wide.model.zero_grad()
    ids = torch.as_tensor(tokens)
    wide.model(ids, labels=ids).loss.backward()
    theirs = {name: p.grad.numpy() for name, p in wide.model.named_parameters()}
    for spec in param_table(wide.config):
        for index, name in spec.hf_names():
            leaf = np.asarray(get_leaf(ours, spec.path))
            leaf = leaf if index is None else leaf[index]
            if spec.hf_transposed:
                leaf = leaf.reshape(spec.hf_shape[::-1]).T
            np.testing.assert_allclose(leaf, theirs[name], rtol=2e-4, atol=2e-6, err_msg=name)
    wide.model.zero_grad()


def test_remat_changes_no_gradient(wide, rng):
    tokens = draw(rng, wide.config, 2, LENGTH)
    plain = loss_and_gradient(wide.params, wide.config, tokens, "none")
    again = loss_and_gradient(wide.params, wide.config, tokens, "block")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), plain, again)
    with pytest.raises(ValueError, match="remat='all' is not known"):
        loss(wide.params, wide.config, tokens, "all")


def test_bfloat16_is_as_near_as_transformers_bfloat16(references, our_logits, rng):
    """Rounding where transformers rounds: our error is no larger than twice theirs."""
    import copy

    torch = pytest.importorskip("torch")
    reference = references("six-layers")
    tokens = draw(rng, reference.config, 3, LENGTH)
    exact = reference.logits(tokens)
    low = copy.deepcopy(reference.model).to(torch.bfloat16)
    with torch.no_grad():
        theirs = low(torch.as_tensor(tokens)).logits.float().numpy()
    ours = our_logits(reference.params, reference.config.replace(compute_dtype="bfloat16"), tokens)
    assert ours.dtype == np.float32
    assert np.abs(ours - exact).mean() < 2 * np.abs(theirs - exact).mean()
    assert np.abs(ours - exact).max() > 1e-3  # it was bfloat16


def test_embedding_scale_is_rounded_to_bfloat16(wide, monkeypatch):
    """sqrt(3584) = 59.87 is 59.75 in bfloat16, and Gemma was trained with that."""
    config = wide.config.replace(
        embed_dim=3584, num_layers=2, hidden_dim=2, vocab_size=2, compute_dtype="bfloat16"
    )
    params = build_tree(param_table(config), lambda spec: np.zeros(spec.shape, np.float32))
    params["embed"] += 1
    # Zero weights make every layer the identity on the residual stream; look at it before the norm.
    monkeypatch.setattr(transformer, "rms_norm", lambda x, weight, eps, **more: x)
    hidden = transformer.encode(params, config, jnp.zeros((1, 1), int), jnp.ones(1, int))
    assert (np.asarray(hidden, np.float32) == 59.75).all()


def test_norm_multiplies_in_float32_before_it_rounds():
    """Gemma's order, (x * (1 + w)).astype, not Llama's x.astype * (1 + w)."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.bfloat16)
    w = jnp.asarray(np.random.default_rng(1).normal(size=32), jnp.bfloat16)
    wide_x, wide_w = np.asarray(x, np.float32), np.asarray(w, np.float32)
    want = wide_x / np.sqrt((wide_x**2).mean(-1, keepdims=True) + 1e-6) * (1 + wide_w)
    got = transformer.rms_norm(x, w, 1e-6)
    assert got.dtype == jnp.bfloat16
    assert (np.asarray(got) == want.astype(jnp.bfloat16)).mean() > 0.999
    llama = (want / (1 + wide_w)).astype(jnp.bfloat16) * (1 + w)
    assert (np.asarray(got) == np.asarray(llama)).mean() < 0.9


def test_blocks_in_a_row_round_as_a_scan_does(small, small_params):
    """In bfloat16: what passes from block to block is rounded in both, whatever is fused."""
    config = small.replace(compute_dtype="bfloat16")
    tokens = jnp.asarray(np.random.default_rng(0).integers(4, 40, (3, LENGTH)))
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)

    @functools.partial(jax.jit, static_argnums=1)
    def run(params, layer_inputs):
        inputs = [dict.fromkeys(config.slots)] * config.num_blocks if layer_inputs else None
        attend = transformer.self_attend(config, positions)
        return transformer.forward(params, config, tokens, positions, attend, inputs)[0]

    assert jnp.array_equal(run(small_params, True), run(small_params, False))
