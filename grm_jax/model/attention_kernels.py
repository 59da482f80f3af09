"""Other projects' fused attention kernels behind `attention_backends.self_attention`'s signature.

Both kernels mask by slots (indices into the row), not by positions. Self-attention is given rows
whose positions rise by one within each segment; there, causal order and windows by slot within a
segment are the same as by position. Padding lies at the end of a row or in a segment of its own, so
no query of a real token sees it.

Dimensions: B batch, T tokens, K key/value heads, G query heads per key/value head, h size of a
head.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from grm_jax.errors import UserError
from grm_jax.model.attention import SAVED, Places
from grm_jax.parallel.mesh import per_device

LANES = 128  # the width of a TPU's vector registers; splash needs lengths that are multiples of it
HEADS = ("batch", None, "attention_heads")  # logical axes by which q, k, v and the output are split


def splash(places: Places, *, window: int | None, softcap: float | None, interpret: bool = False):
    """JAX's splash attention for TPUs: a function of q, k and v.

    Args:
      places: positions and segments; see `attention_backends.self_attention`.
      interpret: run the kernel without a TPU, slowly, for tests.
    """
    segments = None
    if places.query_segment is not None:
        segments = places.query_segment.astype(jnp.int32)

    def compute(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        length = q.shape[1]
        extra = -length % LANES
        if extra:  # padding at the end, which no query of a real token sees
            q, k, v = (
                jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2)) for x in (q, k, v)
            )
        rows = jnp.zeros(q.shape[:2], jnp.int32)  # segments [B, T]
        if segments is not None:
            rows = jnp.pad(segments, ((0, 0), (0, extra)), mode="edge")
        run = functools.partial(_splash_rows, window=window, softcap=softcap, interpret=interpret)
        return per_device(run, (HEADS, HEADS, HEADS, ("batch",)), HEADS)(q, k, v, rows)[:, :length]

    return compute


def _splash_rows(q, k, v, segments, *, window: int | None, softcap: float | None, interpret: bool):
    """Splash attention on one device: q [B, T, K, G, h], k, v [B, T, K, h], segments [B, T]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, groups = q.shape[1], q.shape[3]
    shape = (length, length)
    mask: masks.Mask = masks.CausalMask(shape)
    if window is not None and window < length:
        mask = masks.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in (512, 256, LANES) if length % size == 0)
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
        block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    kernel = kernels.make_splash_mqa(
        mask=masks.MultiHeadMask([mask] * groups), block_sizes=sizes, head_shards=1,
        q_seq_shards=1, attn_logits_soft_cap=softcap, interpret=interpret,
        residual_checkpoint_name=SAVED,
    )  # fmt: skip
    heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))  # over K
    rows = jax.vmap(heads)  # over B
    out = rows(
        jnp.einsum("btkgh->bkgth", q), jnp.einsum("bskh->bksh", k), jnp.einsum("bskh->bksh", v),
        kernels.SegmentIds(segments, segments),
    )  # fmt: skip
    # out is [B, K, G, T, h]
    return jnp.einsum("bkgth->btkgh", out).astype(q.dtype)


def tokamax(places: Places, *, window: int | None, softcap: float | None):
    """tokamax's Mosaic kernel for Hopper and Blackwell GPUs, forward and backward: a function of
    q, k and v. Raises UserError, when that is called, for queries that are not 16-bit floats."""
    slots = jnp.arange(places.query_pos.shape[1])  # [T]
    # The first slot that each query sees: the first of its segment or of its window. [B, T]
    start = jnp.maximum(slots - places.query_pos, 0)
    if window is not None:
        start = jnp.maximum(start, slots - window + 1)

    def compute(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if q.dtype != jnp.bfloat16 and q.dtype != jnp.float16:
            raise UserError(
                f"attention=tokamax computes in bfloat16 or float16, not {q.dtype}; choose chunked "
                "or another compute dtype"
            )
        rows = jnp.broadcast_to(start, q.shape[:2])
        run = functools.partial(_tokamax_rows, softcap=softcap)
        return per_device(run, (HEADS, HEADS, HEADS, ("batch",)), HEADS)(q, k, v, rows)

    return compute


def _tokamax_rows(q, k, v, start, *, softcap: float | None):
    """tokamax's attention on one device: q [B, T, K, G, h], k, v [B, T, K, h], start [B, T]."""
    # tokamax's public function has no argument for the first key that a query sees.
    from tokamax._src.ops.attention.base import (  # pyright: ignore[reportMissingImports]
        Mask,
    )
    from tokamax._src.ops.attention.pallas_mosaic_gpu import (  # pyright: ignore[reportMissingImports]
        PallasMosaicGpuFlashAttention,
    )

    batch, length, kv, groups, head = q.shape
    out = PallasMosaicGpuFlashAttention()(
        q.reshape(batch, length, kv * groups, head), k, v,
        mask=Mask(k_start=start[:, None], is_causal=True), logits_scale=1.0,
        logits_soft_cap=softcap,
    )  # fmt: skip
    return out.reshape(q.shape).astype(q.dtype)
