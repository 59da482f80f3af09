"""Training on G completions of one prompt that computes the prompt once.

A row holds a prompt and all its completions; positions, not slots, say what follows what:

    slots      p0 p1 p2 p3  .   a4 a5 a6  .   b4 b5  .  .       prompt of 4 (P = 5), G = 2, C = 4
    positions  0  1  2  3       4  5  6       4  5

A completion's token sees the prompt and its own completion. Attention runs in these parts (prompt
over itself; completions over the prompt, as one product of G * C queries; each completion over
itself), so nothing is computed between completions. The result is that of G separate rows, at
P + G * C tokens instead of G * (P + C).

Dimensions: B prompts, P prompt slots, G completions a prompt, C completion slots, D embed,
K key/value heads, Q query heads per key/value head, h head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grm_jax.model.attention import attention, soft_weights, visible
from grm_jax.model.config import ModelConfig
from grm_jax.model.gemma2 import Attend, Remat, forward
from grm_jax.model.params import LAYER_KINDS, Params


def group_attend(
    config: ModelConfig, lengths: jax.Array, *, prompt: int, group: int, completion: int
) -> Attend:
    """Attention of rows of `prompt + group * completion` tokens laid out as above.

    Args:
      lengths: [B] prompt lengths.
      prompt, group, completion: P, G and C.
    """
    batch = lengths.shape[0]
    prompt_pos, positions = _positions(lengths, prompt, completion)
    in_prompt = prompt_pos < lengths[:, None]
    masks = {}
    for kind in LAYER_KINDS:
        window = config.sliding_window if kind == "local" else None
        masks[kind] = (
            visible(prompt_pos, prompt_pos, window=window, key_valid=in_prompt),
            # [B, 1, 1, 1, C, P] and [B, 1, 1, 1, C, C]: broadcast over K, Q, G.
            visible(positions, prompt_pos, window=window, key_valid=in_prompt)[:, None, None, None],
            visible(positions, positions, window=window)[:, None, None, None],
        )

    def attend(q, k, v, kind, layer_input):
        del layer_input
        own_prompt, to_prompt, to_self = masks[kind]
        f32, cap = jnp.float32, config.attn_softcap
        qp, kp, vp = q[:, :prompt], k[:, :prompt], v[:, :prompt]
        first = attention(qp, kp, vp, own_prompt, softcap=cap)
        rows = (batch, group, completion)
        qc, kc, vc = (x[:, prompt:].reshape(*rows, *x.shape[2:]) for x in (q, k, v))
        a = jnp.einsum("bgckqh,bpkh->bkqgcp", qc, kp, preferred_element_type=f32)
        b = jnp.einsum("bgckqh,bgdkh->bkqgcd", qc, kc, preferred_element_type=f32)
        a, b = soft_weights(a, to_prompt, softcap=cap), soft_weights(b, to_self, softcap=cap)
        total = jnp.sum(a, axis=-1) + jnp.sum(b, axis=-1)  # [B, K, Q, G, C]
        out = jnp.einsum("bkqgcp,bpkh->bgckqh", a.astype(v.dtype), vp, preferred_element_type=f32)
        out += jnp.einsum("bkqgcd,bgdkh->bgckqh", b.astype(v.dtype), vc, preferred_element_type=f32)
        out /= total.transpose(0, 3, 4, 1, 2)[..., None]
        second = out.astype(q.dtype).reshape(batch, group * completion, *q.shape[2:])
        return jnp.concatenate([first, second], axis=1), None

    return attend


def encode_completions(
    params: Params,
    config: ModelConfig,
    prompts: jax.Array,
    lengths: jax.Array,
    completions: jax.Array,
    *,
    remat: Remat = "none",
) -> jax.Array:
    """Final hidden states from which each completion's tokens are predicted.

    Args:
      prompts: [B, P] right-padded token ids.
      lengths: [B] prompt lengths.
      completions: [B, G, C] right-padded token ids.

    Returns:
      [B, G, C, D]: entry c is the state before completion token c; entry 0 is the prompt's last.
    """
    batch, group, completion = completions.shape
    prompt = prompts.shape[1]
    tokens = jnp.concatenate([prompts, completions.reshape(batch, -1)], axis=1)
    prompt_pos, positions = _positions(lengths, prompt, completion)
    attend = group_attend(config, lengths, prompt=prompt, group=group, completion=completion)
    where = jnp.concatenate([prompt_pos, jnp.tile(positions, (1, group))], axis=1)
    hidden, _ = forward(params, config, tokens, where, attend, remat=remat)
    last = jnp.take_along_axis(hidden[:, :prompt], (lengths - 1)[:, None, None], axis=1)
    first = jnp.broadcast_to(last[:, None], (batch, group, 1, hidden.shape[-1]))
    rest = hidden[:, prompt:].reshape(batch, group, completion, -1)[:, :, :-1]
    return jnp.concatenate([first, rest], axis=2)


def _positions(lengths: jax.Array, prompt: int, completion: int) -> tuple[jax.Array, jax.Array]:
    """Positions of prompt slots [B, P] and of a completion's slots [B, C]."""
    prompt_pos = jnp.broadcast_to(jnp.arange(prompt), (lengths.shape[0], prompt))
    return prompt_pos, lengths[:, None] + jnp.arange(completion)
