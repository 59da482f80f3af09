"""How attention is computed: four backends with one signature, and the choice between them.

| backend   | where           | memory        | softcap | window | segments | gradients |
|-----------|-----------------|---------------|---------|--------|----------|-----------|
| reference | anywhere        | T x S         | yes     | yes    | yes      | yes       |
| chunked   | anywhere        | linear        | yes     | yes    | yes      | yes       |
| splash    | TPU             | linear, fused | yes     | yes    | yes      | yes       |
| tokamax   | H100/H200, B200 | linear, fused | yes     | yes    | yes      | yes       |

All of them compute scores without a softcap, too. A backend that can not compute what is asked
raises an error; nothing falls back in silence.

Dimensions: B batch, T queries, S keys, K key/value heads, G query heads per key/value head, h size
of a head.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from grm_jax.errors import UserError
from grm_jax.model.attention import SAVED, Places, attention
from grm_jax.model.chunked_attention import Static, attention_sums, chunked_attention
from grm_jax.model.options import Backend
from grm_jax.model.residuals import keep
from grm_jax.model.softmax_sums import Sums, soft_weights

log = logging.getLogger("grm_jax")

BLOCK = 512  # how many queries, and how many keys, a block of the chunked backend has

# Both take queries [B, T, K, G, h], keys [B, S, K, h] and values [B, S, K, h]. `Attention` returns
# the output [B, T, K, G, h], `CrossAttention` numerator [B, T, K, G, h],
# total and peak [B, T, K, G].
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
CrossAttention = Callable[[jax.Array, jax.Array, jax.Array], Sums]


def self_attention(
    places: Places, *, window: int | None, softcap: float | None, backend: Backend
) -> Attention:
    """A function that computes the attention of rows to themselves, in the dtype of q.

    Args:
      places: positions, and segments of packed rows. Queries and keys must be the same slots, and
        positions must rise by one within a segment.
      window: the sliding window, or None for a global layer.
      softcap: the softcap of the scores, or None; the queries come already scaled.

    Raises UserError for an unknown backend.
    """
    if backend in ("splash", "tokamax"):
        from grm_jax.model import attention_kernels

        kernel = getattr(attention_kernels, backend)(places, window=window, softcap=softcap)
        return lambda q, k, v: keep(kernel(q, k, v), SAVED)
    if backend == "reference":
        mask = places.mask(window)
        return lambda q, k, v: keep(attention(q, k, v, mask, softcap=softcap), SAVED)
    if backend != "chunked":
        raise UserError(f"unknown attention backend {backend!r}; choose one of {_names()}")
    static = Static(window, softcap, True, BLOCK, BLOCK)
    return lambda q, k, v: chunked_attention(q, k, v, places, static)


def cross_sums(
    places: Places, *, window: int | None, softcap: float | None, backend: Backend
) -> CrossAttention:
    """A function that computes the sums of attention over one of several sets of keys.

    The caller adds up the sums of all sets (`softmax_sums.together`) and divides them (`normalise`
    there). The fused kernels do not return such sums: with "splash"
    and "tokamax", too, they are computed in chunks.
    """
    if backend == "reference":
        mask = places.mask(window)[:, None, None]

        def reference(q, k, v):
            raw = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
            w, peak = soft_weights(raw, mask, softcap=softcap, dtype=v.dtype)  # [B, K, G, T, S]
            out = jnp.einsum("bkgts,bskh->btkgh", w, v, preferred_element_type=jnp.float32)
            total = jnp.moveaxis(jnp.sum(w, axis=-1, dtype=jnp.float32), 3, 1)
            return Sums(out, total, None if peak is None else jnp.moveaxis(peak, 3, 1))

        return reference
    static = Static(window, softcap, False, BLOCK, BLOCK)
    return lambda q, k, v: attention_sums(q, k, v, places, static)


def choose(requested: Backend | Literal["auto"], platform: str, device_kind: str) -> Backend:
    """The backend for a device. A choice made by "auto" is logged once, with its reason.

    Args:
      requested: a backend, or "auto" for the best one that runs on the device.
      platform, device_kind: the attributes of a JAX device.

    Raises UserError for a backend that is unknown or can not run on the device.
    """
    if requested == "auto":
        backend, reason = _best(platform, device_kind)
        _log_once(backend, reason)
        return backend
    if requested not in get_args(Backend):
        raise UserError(f"unknown attention backend {requested!r}; choose auto or {_names()}")
    if requested == "splash" and platform != "tpu":
        raise UserError(f"attention=splash needs a TPU, not {device_kind}; choose auto or chunked")
    if requested == "tokamax":
        if not _hopper(platform, device_kind):
            raise UserError(
                f"attention=tokamax: its gradients with a softcap need an H100, H200 or B200, not "
                f"{device_kind}; choose auto or chunked"
            )
        if importlib.util.find_spec("tokamax") is None:
            raise UserError("attention=tokamax: tokamax is not installed; pip install tokamax")
    return requested


def _best(platform: str, device_kind: str) -> tuple[Backend, str]:
    """The backend that "auto" stands for, and the reason for the log."""
    if platform == "tpu":
        return "splash", "a TPU"
    if _hopper(platform, device_kind):
        if importlib.util.find_spec("tokamax") is not None:
            return "tokamax", device_kind
        return "chunked", f"{device_kind} could use tokamax, which is not installed"
    return "chunked", f"exact and linear in memory on any device, here {device_kind}"


def _hopper(platform: str, device_kind: str) -> bool:
    """Whether the device is a Hopper or data-center Blackwell GPU."""
    names = ("H100", "H200", "H800", "GH200", "B100", "B200", "GB200")
    return platform in ("gpu", "cuda") and any(name in device_kind for name in names)


@functools.cache
def _log_once(backend: str, reason: str) -> None:
    log.info("attention        %s (%s)", backend, reason)


def _names() -> str:
    return ", ".join(get_args(Backend))
