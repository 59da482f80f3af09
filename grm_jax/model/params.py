"""The table of parameters: each parameter is declared once, and everything else is derived from it.

A row gives a parameter's path in the tree, its shape, logical axes and initialiser, and its name
and layout in a Hugging Face checkpoint. The abstract tree, the shardings, random initialisation,
import, export and memory plans are all derived from the table.

The tree (N blocks, each a local and a global layer; the parameters of blocks are stacked over N):

    {"embed": [V, D],
     "blocks": {"local":  {"pre_attn_norm": [N, D], "q": [N, D, H, h], ..., "down": [N, F, D]},
                "global": {the same}},
     "final_norm": [D],
     "score": [D, C]}                      # only with a scalar head

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

Params = dict[str, Any]
LAYER_KINDS = ("local", "global")


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter.

    Attributes:
      path: the keys from the root of the tree.
      shape: the shape in the tree, with a leading N for the stacked parameters of blocks.
      axes: a logical axis name (or None) per dimension; `parallel.mesh` maps them to mesh axes.
      inputs: the dimensions that a product sums over (the fan-in); () for norms and embeddings.
      init_std: the standard deviation of the normal initialiser; 0 means zeros.
      hf_name: the name of the Hugging Face tensor, with `{layer}` in it for parameters of blocks.
      hf_transposed: True for linear layers, which Hugging Face stores flattened, as [outputs,
        inputs], and this tree as the transpose, reshaped; False where both layouts are the same.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    inputs: tuple[int, ...]
    init_std: float
    hf_name: str
    hf_transposed: bool = False

    @property
    def stacked(self) -> bool:
        """Whether the leading dimension runs over blocks."""
        return self.path[0] == "blocks"

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of one layer's parameter."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of the tensor of one layer in a Hugging Face file."""
        if not self.hf_transposed:
            return self.layer_shape
        offset = int(self.stacked)
        fan_in = math.prod(self.shape[i] for i in self.inputs)
        return (math.prod(self.shape[offset:]) // fan_in, fan_in)

    def hf_names(self) -> Iterator[tuple[int | None, str]]:
        """(index into the stacked dimension, Hugging Face name) of each tensor of the parameter.

        The index is None where the parameter is not stacked.
        """
        if not self.stacked:
            yield None, self.hf_name
            return
        for block in range(self.shape[0]):
            layer = 2 * block + LAYER_KINDS.index(self.path[1])
            yield block, self.hf_name.format(layer=layer)


def param_table(config: ModelConfig, *, num_labels: int = 0) -> tuple[ParamSpec, ...]:
    """All parameters of a Gemma-2, in a fixed order.

    Args:
      config: the model's shape.
      num_labels: the width C of the scalar head (`Gemma2ForSequenceClassification`); 0 for none.
    """
    c = config
    n, d, h, k, e, f = (
        c.num_blocks,
        c.embed_dim,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        c.hidden_dim,
    )
    layer = "model.layers.{layer}."
    rows = [
        ParamSpec(
            ("embed",),
            (c.vocab_size, d),
            ("vocab", "embed"),
            (),
            # The input is scaled by sqrt(D), and the output head is tied to the embedding. With
            # this deviation both the first activations and the logits have unit variance.
            d**-0.5,
            "model.embed_tokens.weight",
        )
    ]

    def norm(kind: str, name: str, hf: str) -> ParamSpec:
        path, axes = ("blocks", kind, name), ("layers", "embed_replicated")
        return ParamSpec(path, (n, d), axes, (), 0.0, f"{layer}{hf}.weight")

    def linear(kind: str, name: str, shape: tuple[int, ...], axes, inputs, hf: str) -> ParamSpec:
        shape, axes = (n, *shape), ("layers", *axes)
        std = math.prod(shape[i] for i in inputs) ** -0.5
        hf_name = f"{layer}{hf}.weight"
        return ParamSpec(("blocks", kind, name), shape, axes, inputs, std, hf_name, True)

    q_axes, kv_axes = ("embed", "heads", "head"), ("embed", "kv_heads", "head")
    for kind in LAYER_KINDS:
        rows += [
            norm(kind, "pre_attn_norm", "input_layernorm"),
            linear(kind, "q", (d, h, e), q_axes, (1,), "self_attn.q_proj"),
            linear(kind, "k", (d, k, e), kv_axes, (1,), "self_attn.k_proj"),
            linear(kind, "v", (d, k, e), kv_axes, (1,), "self_attn.v_proj"),
            linear(kind, "o", (h, e, d), ("heads", "head", "embed"), (1, 2), "self_attn.o_proj"),
            norm(kind, "post_attn_norm", "post_attention_layernorm"),
            norm(kind, "pre_ffw_norm", "pre_feedforward_layernorm"),
            linear(kind, "gate", (d, f), ("embed", "mlp"), (1,), "mlp.gate_proj"),
            linear(kind, "up", (d, f), ("embed", "mlp"), (1,), "mlp.up_proj"),
            linear(kind, "down", (f, d), ("mlp", "embed"), (1,), "mlp.down_proj"),
            norm(kind, "post_ffw_norm", "post_feedforward_layernorm"),
        ]
    rows.append(
        ParamSpec(("final_norm",), (d,), ("embed_replicated",), (), 0.0, "model.norm.weight")
    )
    if num_labels:
        rows.append(
            ParamSpec(
                ("score",),
                (d, num_labels),
                ("embed", None),
                (0,),
                0.0,  # with zeros, every critique starts at probability one half
                "score.weight",
                True,
            )
        )
    return tuple(rows)


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
    the scalar head) are zeros.
    """
    keys = dict(zip((s.path for s in table), jax.random.split(key, len(table)), strict=True))

    def leaf(spec: ParamSpec) -> jax.Array:
        if not spec.init_std:
            return jnp.zeros(spec.shape, dtype)
        noise = jax.random.truncated_normal(keys[spec.path], -3.0, 3.0, spec.shape)
        return (noise * spec.init_std).astype(dtype)

    return build_tree(table, leaf)


def count_params(table: tuple[ParamSpec, ...]) -> int:
    """The number of parameters; the tied embedding counts once."""
    return sum(math.prod(spec.shape) for spec in table)
