"""Low-rank adapters: train a b beside a frozen w, and use w + scale a b (arXiv:2106.09685).

The adapters' table is derived from the model's: trained, sharded, saved and counted like any
parameters. `attach` puts them beside the frozen weights for the forward pass and for decoding,
`merge` adds them up for the model that is written at the end.

    {"blocks": {"local": {"q": {"a": [N, D, r], "b": [N, r, H, h]}, ...}, ...}, "score": [D, C]}

Dimensions: as in `params`, and r rank. A scalar head is small and trained whole.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from grm_jax.errors import UserError
from grm_jax.model.linear import LowRank, dense
from grm_jax.model.params import Params, ParamSpec, build_tree, get_leaf

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Adapters instead of full training."""

    rank: int = 0
    """r; 0 trains all parameters."""
    alpha: float = 16.0
    """The change is scaled by alpha / rank."""
    targets: tuple[str, ...] = TARGETS
    """Matrices of a layer that get adapters: q, k, v, o, gate, up, down."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.targets) - set(TARGETS))
        if unknown or not self.targets or self.rank < 0:
            raise UserError(
                f"lora: rank={self.rank}, targets={self.targets}; give rank >= 0 and targets among "
                f"{', '.join(TARGETS)}"
            )

    @property
    def scale(self) -> float:
        return self.alpha / max(self.rank, 1)


def adapter_table(table: tuple[ParamSpec, ...], config: LoRAConfig) -> tuple[ParamSpec, ...]:
    """The trained parameters: two factors a target, and the scalar head if there is one."""
    rows = []
    for spec in table:
        if spec.path == ("score",):
            rows.append(spec)
        elif spec.stacked and spec.path[-1] in config.targets:
            rows += _factors(spec, config.rank)
    return tuple(rows)


def _factors(spec: ParamSpec, rank: int) -> list[ParamSpec]:
    """a, random, of the weight's inputs; b, zero, of its outputs (both stacked over layers)."""
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
      base: frozen parameters: differentiate by the adapters alone.
      adapters: a tree as in `adapter_table`.
      table: the model's, with its scalar head if the adapters hold one.
    """

    def leaf(spec: ParamSpec) -> Any:
        found = _find(adapters, spec.path)
        if found is None:
            return get_leaf(base, spec.path)
        if not isinstance(found, dict):
            return found
        return LowRank(get_leaf(base, spec.path), found["a"], found["b"], scale)

    return build_tree(table, leaf)


def merge(params: Params, key: jax.Array) -> Params:
    """Plain arrays: every `LowRank` as w + scale a b, in the dtype of w (see `linear.dense`).

    Args:
      key: for the rounding into bfloat16.
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
    node: Any = tree
    for key in path:
        if not isinstance(node, dict) or key not in node:
            return None
        node = node[key]
    return node
