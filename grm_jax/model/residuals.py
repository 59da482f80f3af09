"""What a rematerialised backward pass keeps of bfloat16 arrays: their bits, as uint16.

A scan over blocks stacks what its backward pass needs. XLA's CPU compiler converts all of a stack
of bfloat16 numbers to float32 and back to write one block's part into it, which costs time in each
iteration and, for the converted copy, twice the memory of the stack. It writes integers in place.
Elsewhere the bits of a number are the number; what this costs on an accelerator was not measured.

`keep` is for arrays that are computed within the rematerialised function, `keep_input` for its
input. Neither changes a value, or anything in a program without a backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def bits_of(x: jax.Array) -> jax.Array:
    """The bits of a bfloat16 array, as uint16; any other array as it is."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def numbers_of(bits: jax.Array) -> jax.Array:
    """The bfloat16 array whose bits a uint16 array has; any other array as it is."""
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16) if bits.dtype == jnp.uint16 else bits


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def keep(x: jax.Array, name: str) -> jax.Array:
    """x, whose bits have the checkpoint name `name` for the policies of `jax.checkpoint`."""
    del name
    return x


@keep.defjvp
def _keep_jvp(name: str, primals: tuple[jax.Array], tangents: tuple[Any]) -> tuple[jax.Array, Any]:
    return numbers_of(checkpoint_name(bits_of(*primals), name)), *tangents


def keep_input(checkpoint: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`checkpoint(function)`, of whose first argument the bits are kept.

    Args:
      checkpoint: `jax.checkpoint` with its options.
      function: of an array and any further arguments.
    """

    @checkpoint
    def from_bits(bits: jax.Array, x: jax.Array, *rest: Any) -> Any:
        return function(_restored(bits, x), *rest)

    def rematerialised(x: jax.Array, *rest: Any) -> Any:
        return from_bits(bits_of(x), x, *rest)

    return rematerialised


@jax.custom_jvp
def _restored(bits: jax.Array, x: jax.Array) -> jax.Array:
    """x, which a backward pass computes from its bits; the gradient goes to x."""
    del bits
    return x


@_restored.defjvp
def _restored_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[Any, Any]
) -> tuple[jax.Array, Any]:
    return numbers_of(primals[0]), tangents[1]
