"""The table of parameters: each parameter is declared once, and everything else is derived from it.

A row gives a parameter's path in the tree, its shape, logical axes and initialiser, and its name
and layout in a Hugging Face checkpoint. The abstract tree, the shardings, random initialisation,
import, export and memory plans are all derived from the table.

The tree of Gemma-2 (N blocks, each a local and a global layer; the parameters of blocks are stacked
over N):

    {"embed": [V, D],
     "blocks": {"local":  {"pre_attn_norm": [N, D], "q": [N, D, H, h], ..., "down": [N, F, D]},
                "global": {the same}},
     "final_norm": [D],
     "score": [D, C]}                      # only with a scalar head

The layers of a block are those of `ModelConfig.slots`. Other families may also have "rest", the
shorter block of the layers that remain, with a leading dimension of 1, and "head" [V, D], an output
head of their own; a scalar model has no output head. Their layers may have q_norm and k_norm
[N, h], q_bias [N, H, h], k_bias and v_bias [N, K, h], and no post_attn_norm and post_ffw_norm.

Dimensions: V vocabulary, D embedding, H query heads, K key/value heads, h size of a head, F
feed-forward hidden, N blocks, C labels of the scalar head (1).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from grm_jax.model.config import ModelConfig
from grm_jax.model.families import family_of

Params = dict[str, Any]

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # of a Hugging Face checkpoint


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter.

    Attributes:
      path: the keys from the root of the tree.
      shape: the shape in the tree, with a leading N for the stacked parameters of blocks.
      axes: a logical axis name (or None) per dimension; `parallel.mesh` maps them to mesh axes.
      inputs: the dimensions that a product sums over (the fan-in); () for norms and embeddings.
      init_std: the standard deviation of the normal initialiser; 0 means `constant`.
      hf_name: the name of the Hugging Face tensor, with `{layer}` in it for parameters of blocks.
      hf_transposed: True for linear layers, which Hugging Face stores flattened, as [outputs,
        inputs], and this tree as the transpose, reshaped; their biases are [outputs]. False where
        both layouts are the same.
      layers: for a stacked parameter, the number of the layer to which each entry of its leading
        dimension belongs; None for a parameter outside the layers, such as the embedding.
      constant: the initial value where `init_std` is 0.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    inputs: tuple[int, ...]
    init_std: float
    hf_name: str
    hf_transposed: bool = False
    layers: range | None = None
    constant: float = 0.0

    @property
    def stacked(self) -> bool:
        """Whether the leading dimension runs over blocks."""
        return self.layers is not None

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of one layer's parameter."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of the tensor of one layer in a Hugging Face file."""
        if not self.hf_transposed:
            return self.layer_shape
        fan_in = math.prod(self.shape[i] for i in self.inputs)
        fan_out = math.prod(self.layer_shape) // fan_in
        return (fan_out, fan_in) if self.inputs else (fan_out,)

    def hf_names(self) -> Iterator[tuple[int | None, str]]:
        """(index into the stacked dimension, Hugging Face name) of each tensor of the parameter.

        The index is None where the parameter is not stacked.
        """
        if self.layers is None:
            yield None, self.hf_name
            return
        for index, layer in enumerate(self.layers):
            yield index, self.hf_name.format(layer=layer)


def param_table(config: ModelConfig, *, num_labels: int = 0) -> tuple[ParamSpec, ...]:
    """All parameters of a model, in a fixed order.

    Args:
      config: the model's shape and features.
      num_labels: the width C of the scalar head (`Gemma2ForSequenceClassification` and the like),
        which then is the only head; 0 for a language model.
    """
    c = config
    vocabulary = (c.vocab_size, c.embed_dim)
    # With this deviation the first activations, of embeddings that are scaled by sqrt(D), and the
    # logits both have unit variance.
    spread = c.embed_dim**-0.5
    rows = [ParamSpec(("embed",), vocabulary, ("vocab", "embed"), (), spread, EMBED)]
    size = len(c.pattern)
    for index, slot in enumerate(c.slots):
        rows += _layer(c, ("blocks", slot), range(index, c.num_blocks * size, size))
    for index, slot in enumerate(c.rest):
        first = c.num_blocks * size + index
        rows += _layer(c, ("rest", slot), range(first, first + 1))
    one = 0.0 if c.norm_plus_one else 1.0
    norm = ("embed_replicated",)
    rows.append(
        ParamSpec(("final_norm",), (c.embed_dim,), norm, (), 0.0, "model.norm.weight", constant=one)
    )
    if num_labels:
        # With zeros, every critique starts at probability one half.
        shape, axes = (c.embed_dim, num_labels), ("embed", None)
        rows.append(ParamSpec(("score",), shape, axes, (0,), 0.0, "score.weight", True))
    elif not c.tied_head:
        rows.append(ParamSpec(("head",), vocabulary, ("vocab", "embed"), (), spread, HEAD))
    return tuple(rows)


def _layer(c: ModelConfig, path: tuple[str, ...], layers: range) -> list[ParamSpec]:
    """The rows of one slot of a block; `layers`: the layers that are stacked in it."""
    n, d, h, k, e, f = (
        len(layers),
        c.embed_dim,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        c.hidden_dim,
    )
    modules = family_of(c).tensors

    def row(name: str, shape, axes, inputs, std: float, hf: str, **more) -> ParamSpec:
        shape, axes, hf = (n, *shape), ("layers", *axes), f"model.layers.{{layer}}.{hf}"
        return ParamSpec((*path, name), shape, axes, inputs, std, hf, layers=layers, **more)

    def norm(name: str, size: int = d, axis: str = "embed_replicated") -> ParamSpec:
        mean = 0.0 if c.norm_plus_one else 1.0
        hf = f"{modules[name]}.weight"
        return row(name, (size,), (axis,), (), 0.0, hf, constant=mean)

    def linear(name: str, shape: tuple[int, ...], axes, inputs: int = 1) -> ParamSpec:
        std = math.prod(shape[:inputs]) ** -0.5
        summed = tuple(range(1, 1 + inputs))
        hf = f"{modules[name]}.weight"
        return row(name, shape, axes, summed, std, hf, hf_transposed=True)

    def bias(name: str, heads: int, axis: str) -> ParamSpec:
        hf = f"{modules[name]}.bias"
        return row(f"{name}_bias", (heads, e), (axis, "head"), (), 0.0, hf, hf_transposed=True)

    q_axes, kv_axes = ("embed", "heads", "head"), ("embed", "kv_heads", "head")
    rows = [
        norm("pre_attn_norm"),
        linear("q", (d, h, e), q_axes),
        linear("k", (d, k, e), kv_axes),
        linear("v", (d, k, e), kv_axes),
        linear("o", (h, e, d), ("heads", "head", "embed"), 2),
    ]
    if c.qkv_bias:
        rows += [bias("q", h, "heads"), bias("k", k, "kv_heads"), bias("v", k, "kv_heads")]
    if c.qk_norm:
        rows += [norm("q_norm", e, "head"), norm("k_norm", e, "head")]
    if c.post_norms:
        rows.append(norm("post_attn_norm"))
    rows += [
        norm("pre_ffw_norm"),
        linear("gate", (d, f), ("embed", "mlp")),
        linear("up", (d, f), ("embed", "mlp")),
        linear("down", (f, d), ("mlp", "embed")),
    ]
    if c.post_norms:
        rows.append(norm("post_ffw_norm"))
    return rows


def build_tree(table: tuple[ParamSpec, ...], leaf: Callable[[ParamSpec], Any]) -> Params:
    """A nested dict with `leaf(row)` at the path of each row."""
    tree: Params = {}
    for spec in table:
        node = tree
        for key in spec.path[:-1]:
            node = node.setdefault(key, {})
        node[spec.path[-1]] = leaf(spec)
    return tree


def get_leaf(tree: Params, path: tuple[str, ...]) -> Any:
    """The leaf at `path`. Raises KeyError that names the missing part of the path."""
    node = tree
    for depth, key in enumerate(path):
        if key not in node:
            raise KeyError(f"no parameter {'/'.join(path[: depth + 1])}; have {sorted(node)}")
        node = node[key]
    return node


def abstract_params(table: tuple[ParamSpec, ...], dtype=jnp.float32, shardings=None) -> Params:
    """The tree of ShapeDtypeStructs, with `shardings` (a tree like the parameters) if given."""
    tree = build_tree(table, lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype))
    if shardings is None:
        return tree
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def init_params(table: tuple[ParamSpec, ...], key: jax.Array, dtype=jnp.float32) -> Params:
    """Random parameters. Jit it with `out_shardings` to create them on the devices that hold them.

    Weights are normal, truncated at three standard deviations; rows with an `init_std` of 0 (norms,
    biases, the scalar head) are constants.
    """
    keys = dict(zip((s.path for s in table), jax.random.split(key, len(table)), strict=True))

    def leaf(spec: ParamSpec) -> jax.Array:
        if not spec.init_std:
            return jnp.full(spec.shape, spec.constant, dtype)
        noise = jax.random.truncated_normal(keys[spec.path], -3.0, 3.0, spec.shape)
        return (noise * spec.init_std).astype(dtype)

    return build_tree(table, leaf)


def count_params(table: tuple[ParamSpec, ...]) -> int:
    """The number of parameters; the tied embedding counts once."""
    return sum(math.prod(spec.shape) for spec in table)
