"""The forward pass of every family, which the trainer, the reference policy, the sampler and the
scalar heads all call.

    h = embed[tokens] * sqrt(D)
    for each block, for each of its layers (local: with a sliding window; global: without)
        h += post_attn_norm(attend(pre_attn_norm(h)))
        h += post_ffw_norm(mlp(pre_ffw_norm(h)))
    hidden = final_norm(h)

That is Gemma-2; the features of `ModelConfig` say what other families leave out, add or compute
otherwise.

The caller decides how queries meet keys: `attend` gets one layer's rotated and scaled queries, its
rotated keys and its values, and returns the attention output. Training passes `self_attend`, in
which a row attends to itself; the sampler passes functions that read its cache and emit the new
keys and values. What `attend` reads in a layer comes in as `layer_inputs`, one entry a block; what
it emits is returned in the same form.

A profile names the parts of the model by `jax.named_scope`: embed, the slot of a layer in its block
(local and global in Gemma-2), and in each of these attention, mlp and norm.

Dimensions: B batch, T tokens, D embedding, H query heads = K * G, K key/value heads, G query heads
per key/value head, h size of a head, F feed-forward hidden, N blocks in the scan.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from grm_jax.errors import UserError
from grm_jax.model.attention import SAVED, Places
from grm_jax.model.attention_backends import self_attention
from grm_jax.model.config import ModelConfig
from grm_jax.model.linear import computed_once, linear
from grm_jax.model.options import Remat
from grm_jax.model.params import Params
from grm_jax.model.residuals import keep, keep_input
from grm_jax.model.shape import Activation, Kind, RopeScaling, kind_of
from grm_jax.parallel.mesh import constrain

_ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}
PRODUCT = "product"  # the checkpoint name of the results of a layer's matrix products


class Attend(Protocol):
    """One layer's attention: (queries, keys, values, kind, layer input) -> (out, emitted).

    q is [B, T, K, G, h]; k and v are [B, T, K, h], of the new tokens; out is [B, T, K, G, h].
    `layer_input` is this layer's entry of `forward`'s `layer_inputs`, or None if there are none.
    """

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, kind: Kind, layer_input: Any
    ) -> tuple[jax.Array, Any]: ...


@jax.named_scope("norm")
def rms_norm(x: jax.Array, weight: jax.Array, eps: float, *, plus_one: bool = True) -> jax.Array:
    """x / rms(x) * (1 + weight), computed in float32 and returned in the dtype of x.

    The root mean square is over the last dimension: x is [..., D], weight [D]. Without `plus_one`
    the factor is the weight itself.
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    factor = weight.astype(jnp.float32)
    return (y * (1.0 + factor if plus_one else factor)).astype(x.dtype)


def rotary(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sines and cosines [B, T, 1, h/2] of the rotary embedding for `positions` [B, T]."""
    frequency = theta ** (-jnp.arange(0, head_dim // 2, dtype=jnp.float32) * 2 / head_dim)  # [h/2]
    if scaling is not None:
        frequency = _scaled(frequency, scaling)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency  # [B, T, 1, h/2]
    return computed_once(jnp.sin(angle)), computed_once(jnp.cos(angle))


def _scaled(frequency: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Frequencies [h/2], in radians a token, as `RopeScaling` says."""
    divided = frequency / scaling.factor
    if scaling.kind == "linear":
        return divided
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # How often a pair turns within the original length: at most `low` times, it is divided; at
    # least `high` times, it is left alone.
    turns = scaling.original_max_position * frequency / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequency + (1.0 - kept) * divided


def rotate(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Apply the rotary embedding to x [B, T, heads, h]; sin and cos are those of `rotary`.

    Entries i and i + h/2 of a head make a pair (the layout that transformers calls rotate_half).
    """
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # each [B, T, heads, h/2]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def self_attend(
    config: ModelConfig,
    positions: jax.Array,
    *,
    valid: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> Attend:
    """Attention of each row to itself, for training, log-probabilities and scoring.

    Args:
      positions: [B, T] positions within each sequence of a row; they rise by one from slot to slot.
      valid: [B, T], False for padding.
      segments: [B, T] the packed sequence that each token belongs to.
    """
    places = Places(positions, positions, segments, segments, valid)
    compute = {
        kind: self_attention(
            places,
            window=config.window(kind),
            softcap=config.attn_softcap,
            backend=config.attention,
        )
        for kind in config.kinds
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
    """One layer on x [B, T, D]: its output [B, T, D], and what `attend` emitted."""
    c, dtype = config, x.dtype
    batch, length, _ = x.shape

    def product(x: jax.Array, name: str, axes: int = 1) -> jax.Array:
        y = keep(linear(x, p[name], axes), PRODUCT)
        bias = f"{name}_bias"
        if bias not in p:
            return y
        return (y.astype(jnp.float32) + p[bias].astype(jnp.float32)).astype(dtype)

    def norm(x: jax.Array, name: str) -> jax.Array:
        if name not in p:
            return x
        return rms_norm(x, p[name], c.norm_eps, plus_one=c.norm_plus_one)

    with jax.named_scope("attention"):
        h = norm(x, "pre_attn_norm")  # [B, T, D]
        q = rotate(norm(product(h, "q"), "q_norm"), *rotation)  # [B, T, H, h]
        q = q * jnp.asarray(c.query_scale, dtype)
        k = rotate(norm(product(h, "k"), "k_norm"), *rotation)  # [B, T, K, h]
        v = product(h, "v")  # [B, T, K, h]
        # Query head n uses key/value head n // G.
        q = q.reshape(batch, length, c.num_kv_heads, c.queries_per_kv, c.head_dim)
        # A device has whole rows here: a `sequence` mesh axis splits heads instead of tokens.
        q, k, v = (constrain(x, ("batch", None, "attention_heads")) for x in (q, k, v))
        out, emitted = attend(q, k, v)  # [B, T, K, G, h]
        out = out.reshape(batch, length, c.num_heads, c.head_dim)  # [B, T, H, h]
        out = product(out, "o", 2)  # [B, T, D]
        x = x + norm(out, "post_attn_norm")
    with jax.named_scope("mlp"):
        h = norm(x, "pre_ffw_norm")  # [B, T, D]
        # In float32, and rounded once: a chain of operations in bfloat16 rounds after each.
        gate, up = (product(h, name).astype(jnp.float32) for name in ("gate", "up"))  # [B, T, F]
        h = (_ACTIVATIONS[c.activation](gate) * up).astype(dtype)
        out = product(h, "down")  # [B, T, D]
        x = x + norm(out, "post_ffw_norm")
    return x, emitted


def forward(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
    layer_inputs: Sequence[dict[str, Any]] | None = None,
    *,
    remat: Remat = "none",
) -> tuple[jax.Array, Any]:
    """The final hidden states, after the last norm.

    Args:
      params: the tree of `model.params`, as float32 masters or already in the compute dtype. With
        `layer_inputs`, "blocks" may also be a sequence that holds one tree a block.
      config: the model's shape and features; static.
      tokens: [B, T] token ids.
      positions: [B, T] positions, for the rotary embedding.
      attend: see `Attend`.
      layer_inputs: without them the blocks run as a scan. With them, one entry a block, which has
        each layer's by its slot, the blocks run unrolled: the sampler's caches are separate arrays
        per layer, because slicing them out of a stack would copy the whole cache at every step.
      remat: what the backward pass computes again. "none": only what lies between products with
        weights and attention, neither of which is computed twice. "block": each block, from its
        input. "block_save_attention": each block except for its attention. "offload": as "block",
        and the inputs of blocks are kept in host memory.

    Returns:
      hidden [B, T, D] in the compute dtype, and what `attend` emitted, in the form of the layers of
      params: from a scan {"blocks": {slot: leaves [N, ...]}}, with "rest" where there is one; else
      a list that has {slot: ...} of each block.

    Raises ValueError where `layer_inputs` are not one a block, UserError for an unknown `remat`.
    """
    dtype = jnp.dtype(config.compute_dtype)
    with jax.named_scope("embed"):
        x = params["embed"][tokens]  # [B, T, D]
        if layer_inputs is None:
            # Every device looks up its part of D for all tokens, then the devices exchange parts.
            # Without this constraint the compiler would send all tokens to all devices.
            x = constrain(x, ("replicas", None, "embed"))
        x = x.astype(dtype)
        if config.embed_scale:
            # Gemma rounds the scale to the activation dtype first: 48.0, 59.75, 68.0 in bfloat16.
            x = x * jnp.asarray(math.sqrt(config.embed_dim), dtype)
        x = constrain(x, ("batch", "seq", None))
    rotations = _rotations(config, positions)

    def block(x, block_params, inputs=None):
        emitted = {}
        for slot in config.slots:
            if slot not in block_params:  # the shorter block of the layers that remain
                break
            layer_input = None if inputs is None else inputs[slot]
            kind = kind_of(slot)
            with jax.named_scope(slot):
                x, emitted[slot] = _layer(
                    x,
                    block_params[slot],
                    config,
                    rotations[kind],
                    lambda q, k, v, kind=kind, entry=layer_input: attend(q, k, v, kind, entry),
                )
        return constrain(x, ("batch", "seq", None)), emitted

    block = _rematerialised(block, config, remat)
    if layer_inputs is None:
        emitted = {}
        for part in ("blocks", "rest"):
            if part in params:
                unroll = config.scan_unroll if part == "blocks" else 1
                x, emitted[part] = jax.lax.scan(block, x, params[part], unroll=unroll)
    else:
        if len(layer_inputs) != len(config.blocks):
            raise ValueError(f"{len(layer_inputs)} layer inputs for {len(config.blocks)} blocks")
        emitted = []
        for index, inputs in enumerate(layer_inputs):
            # A scan rounds what it carries to its dtype. Without a barrier between unrolled blocks,
            # XLA could keep excess precision from one block to the next.
            x = jax.lax.optimization_barrier(x)
            x, new = block(x, _block_params(params, config, index), inputs)
            emitted.append(new)
        x = jax.lax.optimization_barrier(x)
    hidden = rms_norm(x, params["final_norm"], config.norm_eps, plus_one=config.norm_plus_one)
    return hidden, emitted


def _rotations(
    config: ModelConfig, positions: jax.Array
) -> dict[Kind, tuple[jax.Array, jax.Array]]:
    """The rotary embedding of each kind of layers; kinds with the same one share its arrays."""
    first = config.kinds[0]
    shared = rotary(positions, config.head_dim, *config.rope(first))
    return {
        kind: shared
        if config.rope(kind) == config.rope(first)
        else rotary(positions, config.head_dim, *config.rope(kind))
        for kind in config.kinds
    }


def _block_params(params: Params, config: ModelConfig, index: int) -> Params:
    """The parameters of one block, from a sequence of blocks or out of the stacks."""
    if isinstance(params["blocks"], Sequence):
        return params["blocks"][index]
    if index == config.num_blocks:
        return jax.tree.map(lambda w: w[0], params["rest"])
    return jax.tree.map(lambda w: w[index], params["blocks"])


def _rematerialised(
    block: Callable[..., Any], config: ModelConfig, remat: Remat
) -> Callable[..., Any]:
    """`block`, whose backward pass recomputes what `remat` says (see `forward`)."""
    policies = jax.checkpoint_policies
    if remat == "none":
        names = policies.save_only_these_names(PRODUCT, SAVED)
        return keep_input(functools.partial(jax.checkpoint, policy=names, prevent_cse=False), block)
    # In a scan of single blocks the forward and the backward pass are separate loops, so that XLA
    # can not merge the recomputation into the forward pass. In an unrolled scan it could.
    recomputed = functools.partial(jax.checkpoint, prevent_cse=config.scan_unroll > 1)
    if remat == "block":
        return keep_input(recomputed, block)
    if remat == "block_save_attention":
        names = policies.save_only_these_names(SAVED)
        return keep_input(functools.partial(recomputed, policy=names), block)
    if remat == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["block_input"],
            offload_src="device",
            offload_dst="pinned_host",
        )

        def with_named_input(x, *rest):
            return block(checkpoint_name(x, "block_input"), *rest)

        return jax.checkpoint(with_named_input, policy=policy)
    raise UserError(f"remat={remat!r} is not known; choose one of {', '.join(get_args(Remat))}")


def encode(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    remat: Remat = "none",
) -> jax.Array:
    """Hidden states of right-padded rows: tokens [B, T], lengths [B] -> [B, T, D].

    "blocks" of params may be a sequence that holds one tree a block, as the sampler has them.
    """
    index = jnp.arange(tokens.shape[1])  # [T]
    positions = jnp.broadcast_to(index, tokens.shape)  # [B, T]
    valid = index[None, :] < lengths[:, None]  # [B, T]
    attend = self_attend(config, positions, valid=valid)
    apart = isinstance(params["blocks"], Sequence)
    inputs = [dict.fromkeys(slots) for slots in config.blocks] if apart else None
    return forward(params, config, tokens, positions, attend, inputs, remat=remat)[0]


def encode_packed(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    *,
    remat: Remat = "none",
) -> jax.Array:
    """Hidden states [B, T, D] of rows that hold several sequences; every argument is [B, T].

    Args:
      positions: counted from 0 in each sequence.
      segments: which sequence of its row a token belongs to; padding has a segment of its own.
    """
    attend = self_attend(config, positions, segments=segments)
    return forward(params, config, tokens, positions, attend, remat=remat)[0]
