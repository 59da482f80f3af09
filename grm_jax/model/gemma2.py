"""Gemma-2's forward pass, once: trainer, reference model, sampler and scalar heads all call it.

    h = embed[tokens] * sqrt(D)
    for each block: local layer (sliding window), then global layer, each
        h += post_attn_norm(attend(pre_attn_norm(h)))
        h += post_ffw_norm(mlp(pre_ffw_norm(h)))
    hidden = final_norm(h)

How queries meet keys is the caller's: `attend` gets one layer's rotated, scaled queries, keys and
values and returns the attention output. Training passes `self_attend` (keys are the row's own);
the sampler passes functions that fill and read its cache. What `attend` reads per layer comes in
as `layer_inputs`, one entry a block, and what it produces goes out likewise.

Dimensions: B batch, T tokens, D embed, H query heads = K * G, K key/value heads, h head, F hidden,
N blocks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from grm_jax.errors import UserError
from grm_jax.model.attention import SAVED, Places
from grm_jax.model.attention_backends import self_attention
from grm_jax.model.config import ModelConfig
from grm_jax.model.linear import linear
from grm_jax.model.params import LAYER_KINDS, Params
from grm_jax.parallel.mesh import constrain

Kind = Literal["local", "global"]
Remat = Literal["none", "block", "block_save_attention", "offload"]
PRODUCT = "product"  # the results of a layer's matrix products, by name


class Attend(Protocol):
    """One layer's attention: (queries, keys, values, kind, this layer's inputs) -> (out, outputs).

    q [B, T, K, G, h]; k, v [B, T, K, h] of the new tokens; out [B, T, K, G, h]. `layer_input` is
    this layer's entry of `forward`'s `layer_inputs` (None if there are none).
    """

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, kind: Kind, layer_input: Any
    ) -> tuple[jax.Array, Any]: ...


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * (1 + weight), computed in float32, returned in the dtype of x."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)


def rotary(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Sines and cosines [B, T, 1, h/2] of the rotary embedding for `positions` [B, T]."""
    frequency = theta ** (-jnp.arange(0, head_dim // 2, dtype=jnp.float32) * 2 / head_dim)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency
    return jnp.sin(angle), jnp.cos(angle)


def rotate(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Rotate the two halves of the head dimension (rotate_half) of x [B, T, heads, h]."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def self_attend(
    config: ModelConfig,
    positions: jax.Array,
    *,
    valid: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> Attend:
    """Attention of a row over itself: training, log-probabilities, scoring.

    Args:
      positions: [B, T] positions within each (packed) sequence, which rise by one a slot.
      valid: [B, T], False for padding.
      segments: [B, T] ids of packed sequences.
    """
    places = Places(positions, positions, segments, segments, valid)
    compute = {
        kind: self_attention(
            places,
            window=config.sliding_window if kind == "local" else None,
            softcap=config.attn_softcap,
            backend=config.attention,
        )
        for kind in LAYER_KINDS
    }

    def attend(q, k, v, kind, layer_input):
        del layer_input
        return compute[kind](q, k, v), None

    return attend


def _layer(
    x: jax.Array,
    p: Params,
    config: ModelConfig,
    rotation: tuple[jax.Array, jax.Array],
    attend: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]],
) -> tuple[jax.Array, Any]:
    """One Gemma-2 layer on x [B, T, D]."""
    c, dtype = config, x.dtype
    batch, length, _ = x.shape
    w = {
        name: value.astype(dtype) if isinstance(value, jax.Array) else value
        for name, value in p.items()
        if not name.endswith("norm")
    }

    def product(x: jax.Array, name: str, axes: int = 1) -> jax.Array:
        return checkpoint_name(linear(x, w[name], axes), PRODUCT)

    h = rms_norm(x, p["pre_attn_norm"], c.norm_eps)
    q = rotate(product(h, "q"), *rotation) * jnp.asarray(c.query_scale, dtype)
    k = rotate(product(h, "k"), *rotation)
    v = product(h, "v")
    # Query head n uses key/value head n // G.
    q = q.reshape(batch, length, c.num_kv_heads, c.queries_per_kv, c.head_dim)
    # Rows are whole here: with a `sequence` axis, heads are split over it instead of tokens.
    q, k, v = (constrain(x, ("batch", None, "attention_heads")) for x in (q, k, v))
    out, emitted = attend(q, k, v)
    out = out.reshape(batch, length, c.num_heads, c.head_dim)
    out = product(out, "o", 2)
    x = x + rms_norm(out, p["post_attn_norm"], c.norm_eps)
    h = rms_norm(x, p["pre_ffw_norm"], c.norm_eps)
    gate = jax.nn.gelu(product(h, "gate"), approximate=True)
    out = product(gate * product(h, "up"), "down")
    return x + rms_norm(out, p["post_ffw_norm"], c.norm_eps), emitted


def forward(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
    layer_inputs: Sequence[dict[Kind, Any]] | None = None,
    *,
    remat: Remat = "none",
) -> tuple[jax.Array, Any]:
    """Final hidden states, after the last norm.

    Args:
      params: the tree of `model.params`; float32 masters or already in the compute dtype. With
        `layer_inputs`, "blocks" may also be a sequence of one tree a block.
      config: static.
      tokens: [B, T] token ids.
      positions: [B, T] positions, for the rotary embedding.
      attend: see `Attend`.
      layer_inputs: None, and the blocks run as a scan; or one {"local": ..., "global": ...} a
        block, and they run unrolled: the sampler's caches are separate arrays per layer,
        because slicing them out of a stack would copy the whole cache every step.
      remat: what the backward pass computes again: "none", no product with a weight, only what
        lies between them; "block", each pair of layers from its input; "block_save_attention", all
        of it but attention; "offload", as block, with the inputs kept in host memory.

    Returns:
      hidden [B, T, D] in the compute dtype, and what `attend` emitted: {"local": ..., "global":
      ...} with leaves [N, ...] from a scan, or a list of such trees, one a block.
    """
    dtype = jnp.dtype(config.compute_dtype)
    # Gemma rounds the scale to the activation dtype first: 48.0, 59.75, 68.0 in bfloat16.
    scale = jnp.asarray(math.sqrt(config.embed_dim), dtype)
    x = params["embed"][tokens]
    if layer_inputs is None:
        # Every device looks up its part of the words' dimensions, then devices trade parts: the
        # compiler, left alone, would give all tokens to all devices.
        x = constrain(x, ("replicas", None, "embed"))
    x = constrain(x.astype(dtype) * scale, ("batch", "seq", None))
    rotation = rotary(positions, config.head_dim, config.rope_theta)

    def block(x, block_params, inputs=None):
        emitted = {}
        for kind in LAYER_KINDS:
            given = None if inputs is None else inputs[kind]
            x, emitted[kind] = _layer(
                x,
                block_params[kind],
                config,
                rotation,
                lambda q, k, v, kind=kind, given=given: attend(q, k, v, kind, given),
            )
        return constrain(x, ("batch", "seq", None)), emitted

    block = _rematerialised(block, config, remat)
    if layer_inputs is None:
        x, emitted = jax.lax.scan(block, x, params["blocks"], unroll=config.scan_unroll)
    else:
        if len(layer_inputs) != config.num_blocks:
            raise ValueError(f"{len(layer_inputs)} layer inputs for {config.num_blocks} blocks")
        emitted = []
        for index, inputs in enumerate(layer_inputs):
            # What a scan carries is rounded to its dtype. Without a border between blocks, XLA may
            # keep excess precision here.
            x = jax.lax.optimization_barrier(x)
            block_params = (
                params["blocks"][index]
                if isinstance(params["blocks"], Sequence)
                else jax.tree.map(lambda w, index=index: w[index], params["blocks"])
            )
            x, new = block(x, block_params, inputs)
            emitted.append(new)
        x = jax.lax.optimization_barrier(x)
    return rms_norm(x, params["final_norm"], config.norm_eps), emitted


def _rematerialised(
    block: Callable[..., Any], config: ModelConfig, remat: Remat
) -> Callable[..., Any]:
    """The block with what `remat` says about its backward pass."""
    policies = jax.checkpoint_policies
    if remat == "none":
        names = policies.save_only_these_names(PRODUCT, SAVED)
        return jax.checkpoint(block, policy=names, prevent_cse=False)
    # A scan's forward and backward pass are separate programs: nothing else keeps them apart.
    again = functools.partial(jax.checkpoint, block, prevent_cse=config.scan_unroll > 1)
    if remat == "block":
        return again()
    if remat == "block_save_attention":
        return again(policy=policies.save_only_these_names(SAVED))
    if remat == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["block_input"],
            offload_src="device",
            offload_dst="pinned_host",
        )

        def named(x, *rest):
            return block(checkpoint_name(x, "block_input"), *rest)

        return jax.checkpoint(named, policy=policy)
    raise UserError(f"remat={remat!r} is not known; choose one of {', '.join(get_args(Remat))}")


def encode(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    remat: Remat = "none",
) -> jax.Array:
    """Hidden states of right-padded rows: tokens [B, T], lengths [B] -> [B, T, D]."""
    index = jnp.arange(tokens.shape[1])
    positions = jnp.broadcast_to(index, tokens.shape)
    valid = index[None, :] < lengths[:, None]
    attend = self_attend(config, positions, valid=valid)
    return forward(params, config, tokens, positions, attend, remat=remat)[0]


def encode_packed(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    *,
    remat: Remat = "none",
) -> jax.Array:
    """Hidden states of rows that hold several sequences: all [B, T] -> [B, T, D].

    Args:
      positions: from 0 in each sequence.
      segments: which sequence of its row a token belongs to; padding has one of its own.
    """
    attend = self_attend(config, positions, segments=segments)
    return forward(params, config, tokens, positions, attend, remat=remat)[0]
