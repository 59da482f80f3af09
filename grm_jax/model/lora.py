"""LoRA: train low-rank adapters a, b beside a frozen w, and use w + scale a b (arXiv:2106.09685).

The table of the adapters is derived from the model's, so adapters are initialised, sharded, saved
and counted as parameters are. `attach` puts them beside the frozen weights for the forward pass and
for decoding; `merge` adds them to the weights, for the model that is written at the end.

    {"blocks": {"local": {"q": {"a": [N, D, r], "b": [N, r, H, h]}, ...}, ...}, "score": [D, C]}

A scalar head is small; it has no adapter and is trained itself.

Dimensions: as in `params`, and r rank.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from grm_jax.model.linear import LowRank, dense
from grm_jax.model.options import LoRAConfig
from grm_jax.model.params import Params, ParamSpec, build_tree, get_leaf


def adapter_table(table: tuple[ParamSpec, ...], config: LoRAConfig) -> tuple[ParamSpec, ...]:
    """The trained parameters: a and b for each target, and the scalar head if there is one."""
    rows = []
    for spec in table:
        if spec.path == ("score",):
            rows.append(spec)
        elif spec.stacked and spec.path[-1] in config.targets:
            rows += _factors(spec, config.rank)
    return tuple(rows)


def _factors(spec: ParamSpec, rank: int) -> list[ParamSpec]:
    """The rows of a (random, [N, inputs..., r]) and b (zero, [N, r, outputs...]) of one weight."""
    first, split = 1, 1 + len(spec.inputs)
    a = dataclasses.replace(
        spec,
        path=(*spec.path, "a"),
        shape=(*spec.shape[:split], rank),
        axes=(*spec.axes[:split], None),
        hf_name="",
    )
    b = dataclasses.replace(
        spec,
        path=(*spec.path, "b"),
        shape=(*spec.shape[:first], rank, *spec.shape[split:]),
        axes=(*spec.axes[:first], None, *spec.axes[split:]),
        inputs=(first,),
        init_std=0.0,
        hf_name="",
    )
    return [a, b]


def attach(base: Params, adapters: Params, table: tuple[ParamSpec, ...], scale: float) -> Params:
    """The forward pass's parameters: `LowRank` where there is an adapter, else the frozen weight.

    Args:
      base: the frozen parameters; differentiate with respect to the adapters alone.
      adapters: a tree as in `adapter_table`.
      table: the model's table, with its scalar head if the adapters hold one.
      scale: see `LoRAConfig.scale`.
    """

    def leaf(spec: ParamSpec) -> Any:
        trained = _find(adapters, spec.path)
        if trained is None:
            return get_leaf(base, spec.path)
        if not isinstance(trained, dict):  # the scalar head
            return trained
        return LowRank(get_leaf(base, spec.path), trained["a"], trained["b"], scale)

    return build_tree(table, leaf)


def merge(params: Params, key: jax.Array) -> Params:
    """Parameters as plain arrays: every `LowRank` becomes w + scale a b, in the dtype of w.

    Args:
      params: a tree that `attach` has made.
      key: the randomness of rounding to bfloat16 (see `linear.dense`).
    """
    leaves, tree = jax.tree.flatten(params, is_leaf=lambda w: isinstance(w, LowRank))
    return jax.tree.unflatten(
        tree,
        [
            jax.vmap(dense)(w, jax.random.split(jax.random.fold_in(key, index), w.a.shape[0]))
            if isinstance(w, LowRank)
            else w
            for index, w in enumerate(leaves)
        ],
    )


def _find(tree: Params, path: tuple[str, ...]) -> Any:
    """The node of the tree at `path`, or None if there is none."""
    node: Any = tree
    for key in path:
        if not isinstance(node, dict) or key not in node:
            return None
        node = node[key]
    return node
