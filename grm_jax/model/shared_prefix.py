"""Forward passes over G completions of a prompt that compute the prompt once.

A row holds a prompt and all its completions; order is given by positions, not by slots:

    slots      p0 p1 p2 p3  .   a4 a5 a6  .   b4 b5  .  .       prompt of 4 (P = 5), G = 2, C = 4
    positions  0  1  2  3       4  5  6       4  5

A token of a completion sees the prompt and its own completion. Attention is computed in three
parts, and nothing is computed between two completions: the prompt to itself; all completions to
the prompt, as one product of G * C queries; and each completion to itself. The result is that of
G separate rows, for P + G * C tokens instead of G * (P + C).

Dimensions: B prompts, P prompt slots, G completions of a prompt, C completion slots, D embedding,
K key/value heads, Q query heads per key/value head, h size of a head.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from grm_jax.model.attention import Places
from grm_jax.model.attention_backends import cross_sums, self_attention
from grm_jax.model.config import ModelConfig
from grm_jax.model.options import Remat
from grm_jax.model.params import Params
from grm_jax.model.softmax_sums import Sums, normalise, together
from grm_jax.model.transformer import Attend, forward


def group_attend(
    config: ModelConfig, lengths: jax.Array, *, prompt: int, group: int, completion: int
) -> Attend:
    """Attention of rows of `prompt + group * completion` tokens, laid out as drawn above.

    Args:
      lengths: [B] prompt lengths.
      prompt, group, completion: P, G and C.
    """
    batch = lengths.shape[0]
    prompt_pos, positions = _positions(lengths, prompt, completion)  # [B, P], [B, C]
    in_prompt = prompt_pos < lengths[:, None]  # [B, P]
    side_by_side = jnp.tile(positions, (1, group))  # [B, G * C]
    separate = jnp.repeat(positions, group, axis=0)  # [B * G, C]
    parts = {}
    for kind in config.kinds:
        settings: dict[str, Any] = {
            "window": config.window(kind),
            "softcap": config.attn_softcap,
            "backend": config.attention,
        }
        parts[kind] = (
            self_attention(Places(prompt_pos, prompt_pos, key_valid=in_prompt), **settings),
            cross_sums(Places(side_by_side, prompt_pos, key_valid=in_prompt), **settings),
            cross_sums(Places(separate, separate), **settings),
        )

    def attend(q, k, v, kind, layer_input):
        del layer_input
        prompt_to_prompt, to_prompt, to_completion = parts[kind]
        qp, kp, vp = (x[:, :prompt] for x in (q, k, v))  # [B, P, K, (Q,) h]
        rest = [x[:, prompt:] for x in (q, k, v)]  # [B, G * C, K, (Q,) h]
        before = to_prompt(rest[0], kp, vp)  # numerator [B, G * C, K, Q, h], total [B, G * C, K, Q]
        # The same of [B * G, C, ...].
        own = to_completion(*(x.reshape(batch * group, completion, *x.shape[2:]) for x in rest))
        own = Sums(*jax.tree.map(lambda x: x.reshape(batch, -1, *x.shape[2:]), own))
        sums = together(before, own)
        out = [prompt_to_prompt(qp, kp, vp), normalise(sums, q.dtype)]
        return jnp.concatenate(out, axis=1), None  # [B, P + G * C, K, Q, h]

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
      [B, G, C, D]: entry c is the state from which completion token c is predicted; entry 0 is that
      of the prompt's last token.
    """
    batch, group, completion = completions.shape
    prompt = prompts.shape[1]
    tokens = jnp.concatenate([prompts, completions.reshape(batch, -1)], axis=1)  # [B, P + G * C]
    prompt_pos, completion_pos = _positions(lengths, prompt, completion)
    attend = group_attend(config, lengths, prompt=prompt, group=group, completion=completion)
    positions = jnp.concatenate([prompt_pos, jnp.tile(completion_pos, (1, group))], axis=1)
    hidden, _ = forward(params, config, tokens, positions, attend, remat=remat)
    last = jnp.take_along_axis(hidden[:, :prompt], (lengths - 1)[:, None, None], axis=1)
    first = jnp.broadcast_to(last[:, None], (batch, group, 1, hidden.shape[-1]))  # [B, G, 1, D]
    rest = hidden[:, prompt:].reshape(batch, group, completion, -1)[:, :, :-1]  # [B, G, C - 1, D]
    return jnp.concatenate([first, rest], axis=2)


def _positions(lengths: jax.Array, prompt: int, completion: int) -> tuple[jax.Array, jax.Array]:
    """Positions of prompt slots [B, P] and of a completion's slots [B, C]."""
    prompt_pos = jnp.broadcast_to(jnp.arange(prompt), (lengths.shape[0], prompt))
    return prompt_pos, lengths[:, None] + jnp.arange(completion)
