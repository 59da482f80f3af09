"""A linear map whose weight may be stored in more than one way.

The forward pass multiplies through `linear`. A weight is an array or one of three other forms:
`LowRank`, which LoRA trains and decodes with, and `OutMajor` and `Int8`, which only decoding uses
(`sampler.weights` makes them).

Dimensions: "in" and "out" are the flattened input and output dimensions of a weight, r the rank of
an adapter, rows the flattened leading dimensions of x.
"""

from __future__ import annotations

import functools
import math
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp

# Up to this many rows a CPU multiplies faster with the matrix on the left; with more, slower.
FEW = 128


def apart(x: jax.Array) -> jax.Array:
    """x, behind an optimization barrier on a CPU, so that its uses do not change its computation.

    Without the barrier, XLA's CPU compiler turns the transpose of a product into a product of
    transposed matrices, which costs more than transposing the result.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def computed_once(x: jax.Array) -> jax.Array:
    """float32 x, which a CPU computes once and reads in each of its uses.

    XLA's CPU compiler computes an elementwise operation again in each of its uses, through
    optimization barriers, too, since it drops them before it fuses. It does not do that to a
    product: here that with the identity, which is exact for finite numbers.
    """

    def product(x: jax.Array) -> jax.Array:
        identity = jnp.eye(x.shape[-1], dtype=x.dtype)
        return jnp.matmul(x, identity, precision=jax.lax.Precision.HIGHEST)

    return jax.lax.platform_dependent(x, cpu=product, default=lambda x: x)


@flax.struct.dataclass
class OutMajor:
    """A matrix stored [out, in] that is multiplied from the left, [out, in] x [in, rows].

    On a CPU, XLA's product of few rows is faster in this form. An optimization barrier keeps the
    compiler from changing it back into the usual one.

    Attributes:
      matrix: [out, in].
      shape: the trailing dimensions of the output, whose product is `out`.
    """

    matrix: jax.Array
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def apply(self, x: jax.Array, axes: int) -> jax.Array:
        """The float32 product of the weight and the last `axes` dimensions of x."""
        lead = x.shape[: x.ndim - axes]
        rows = x.reshape(math.prod(lead), -1)  # [rows, in]
        if rows.shape[0] > FEW:  # prefill: the tokens of prompts
            out = jnp.einsum("ri,oi->ro", rows, self.matrix, preferred_element_type=jnp.float32)
        else:
            out = jnp.einsum("oi,ri->or", self.matrix, rows, preferred_element_type=jnp.float32)
            out = jax.lax.optimization_barrier(out).T  # [rows, out]
        return out.reshape(*lead, *self.shape)


@flax.struct.dataclass
class Int8:
    """A weight of 8-bit integers with one float32 scale for each output: w = values * scale.

    Attributes:
      values: int8, in the shape of the weight.
      scale: float32, in the shape of the weight with 1 for each input dimension.
    """

    values: jax.Array
    scale: jax.Array

    def apply(self, x: jax.Array, axes: int) -> jax.Array:
        """The float32 product of the weight and the last `axes` dimensions of x."""
        values = self.values.astype(x.dtype)
        out = jnp.tensordot(x, values, axes, preferred_element_type=jnp.float32)
        return out * self.scale.reshape(self.scale.shape[axes:])


@flax.struct.dataclass
class LowRank:
    """A frozen weight and a trained change of low rank: w + scale a b (see `model.lora`).

    The change is not added to the weight, since in bfloat16 that would lose changes of less than
    0.2% of a weight.

    Attributes:
      w: the frozen weight, in any form; no gradient reaches it.
      a: [inputs of w..., r].
      b: [r, outputs of w...].
      scale: the factor of the change.
    The three arrays may have a leading axis of layers, over which a scan runs.
    """

    w: jax.Array | OutMajor | Int8
    a: jax.Array
    b: jax.Array
    scale: float = flax.struct.field(pytree_node=False)

    def apply(self, x: jax.Array, axes: int) -> jax.Array:
        """The product of x with w + scale a b, without ever forming a b.

        Both parts are added in float32. The result is float32 where w is `OutMajor` or `Int8`, else
        it is rounded to the dtype of x.
        """
        if isinstance(self.w, OutMajor | Int8):
            return self.w.apply(x, axes) + self.scale * _change(x, self.a, self.b, axes)
        w = jax.lax.stop_gradient(self.w)
        return cast(jax.Array, _adapted(axes, self.scale, x, w, self.a, self.b))


def _contract(x: jax.Array, y: jax.Array, axes: Any) -> jax.Array:
    """The float32 product of x and y in the dtype of x; `axes` as of `jnp.tensordot`.

    Asking for a float32 result is also what is fast in bfloat16: a CPU's units for bfloat16 add up
    in float32, and XLA uses them only where the result may stay so.
    """
    return jnp.tensordot(x, y.astype(x.dtype), axes, preferred_element_type=jnp.float32)


def _change(x: jax.Array, a: jax.Array, b: jax.Array, axes: int) -> jax.Array:
    """The float32 product x a b."""
    return _contract(_contract(x, a, axes).astype(x.dtype), b, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _adapted(
    axes: int, scale: float, x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array
) -> jax.Array:
    """x (w + scale a b), in the dtype of x; both parts are added before they are rounded."""
    return (_contract(x, w, axes) + scale * _change(x, a, b, axes)).astype(x.dtype)


def _adapted_forward(axes: int, scale: float, x, w, a, b):
    return _adapted(axes, scale, x, w, a, b), (x, w, a, b)


def _adapted_backward(axes: int, scale: float, kept: tuple[jax.Array, ...], dy: jax.Array):
    """The gradients of x, a and b; with dlow = scale dy b', they are dy w' + dlow a', x' dlow and
    scale (x a)' dy."""
    x, w, a, b = kept
    rows = list(range(x.ndim - axes))
    outputs = list(range(len(rows), dy.ndim))
    low = _contract(x, a, axes).astype(x.dtype)  # [..., r]
    dlow = scale * _contract(dy, b, (outputs, list(range(1, b.ndim))))
    dlow = dlow.astype(x.dtype)  # [..., r]
    dx = _contract(dy, w, (outputs, list(range(axes, w.ndim))))
    dx += _contract(dlow, a, ([len(rows)], [axes]))
    da = _contract(x, dlow, (rows, rows))
    db = scale * _contract(low, dy, (rows, rows))
    return dx.astype(x.dtype), None, da.astype(a.dtype), db.astype(b.dtype)


_adapted.defvjp(_adapted_forward, _adapted_backward)


def dense(weight: LowRank, key: jax.Array) -> jax.Array:
    """A layer's weight as one array: w + scale a b, computed in float32, in the dtype of w.

    The result is rounded stochastically where w is bfloat16. Rounding to nearest would lose every
    small change, since w itself is a bfloat16 number.
    """
    w = cast(jax.Array, weight.w)
    a, b = (x.astype(jnp.float32) for x in (weight.a, weight.b))
    merged = w.astype(jnp.float32) + weight.scale * jnp.tensordot(a, b, 1)
    return round_randomly(merged, key) if w.dtype == jnp.bfloat16 else merged.astype(w.dtype)


def round_randomly(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 x, stochastically rounded to one of the two nearest bfloat16 numbers.

    The probability of each is proportional to its nearness, so that the expected value is x.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = (bits + noise) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(cut, jnp.float32).astype(jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def linear(x: jax.Array, w: Any, axes: int = 1) -> jax.Array:
    """Contract the last `axes` dimensions of x with the first `axes` of w; in the dtype of x.

    The product is computed in the dtype of x, added up in float32, and rounded once; so are its
    gradients, of which that of w has the dtype of w (float32, for a master).

    Args:
      x: [..., inputs of w...].
      w: an array [inputs..., outputs...], or a weight in one of the forms above.
    """
    if isinstance(w, OutMajor | Int8 | LowRank):
        return w.apply(x, axes).astype(x.dtype)
    return cast(jax.Array, _product(x, w, axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, w: jax.Array, axes: int) -> jax.Array:
    return _contract(x, w, axes).astype(x.dtype)


def _product_forward(x: jax.Array, w: jax.Array, axes: int):
    return _product(x, w, axes), (x, w)


def _product_backward(axes: int, kept: tuple[jax.Array, jax.Array], dy: jax.Array):
    """The gradients of x and of w, each rounded once, to the dtype of x and of w.

    For the gradient of w a CPU transposes one of x and dy; the order of the product is chosen so
    that it is the narrower of the two.
    """
    x, w = kept
    rows = list(range(x.ndim - axes))
    inputs, outputs = list(range(len(rows), x.ndim)), list(range(len(rows), dy.ndim))
    dx = _contract(dy, w, (outputs, list(range(axes, w.ndim))))
    if math.prod(w.shape[:axes]) <= math.prod(w.shape[axes:]):
        dw = _contract(x, dy, (rows, rows))
    else:
        dw = apart(_contract(dy, x, (rows, rows)))
        dw = jnp.moveaxis(dw, range(-len(inputs), 0), range(len(inputs)))
    return dx.astype(x.dtype), dw.astype(w.dtype)


_product.defvjp(_product_forward, _product_backward)


def int8(w: jax.Array, axes: int) -> Int8:
    """A weight, whose first `axes` dimensions are inputs, rounded to the nearest `Int8`."""
    over = tuple(range(axes))
    scale = jnp.maximum(jnp.max(jnp.abs(w.astype(jnp.float32)), over, keepdims=True), 1e-12) / 127
    values = jnp.clip(jnp.round(w.astype(jnp.float32) / scale), -127, 127)
    return Int8(values.astype(jnp.int8), scale)
