"""Parameters in the sampler's layout: compute dtype, a tree a block, nothing to gather per token.

Training splits the parameters over the data axes too; decoding reads all of them for every token,
here each data-parallel shard has them whole (split over `tensor` alone). Adapters stay apart from
what they change, as in training. Made once a rollout, or once and for all in place of parameters
that are for sampling alone (`take`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from grm_jax.model import linear
from grm_jax.model.config import ModelConfig
from grm_jax.model.heads import output_matrix
from grm_jax.model.linear import Int8, LowRank, OutMajor
from grm_jax.model.params import Params, param_table
from grm_jax.parallel.mesh import sharding
from grm_jax.sampler.programs import Programs

# Input dimensions of each matrix of a layer.
INPUTS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


def decode_weights(
    programs: Programs,
    config: ModelConfig,
    params: Params,
    rows: int,
    *,
    int8: bool = False,
) -> Params:
    """The parameters as `decode` wants them; "blocks" is a tuple of one tree a block.

    What has that layout already is not copied: those that `take` returned, or of a trainer's the
    embedding, the head and the last norm where their dtype and sharding are decoding's. It shares
    its buffers with the result, so neither may be donated while the other is used.

    Args:
      rows: lanes of a shard. With few of them, a CPU multiplies by matrices stored the other way
        round (`model.linear.OutMajor`), which are copies.
      int8: matrices as `model.linear.Int8`, the output head's too (words are looked up exactly).
    """
    made = params if laid_out(params) else _Layout(programs, config, int8).made(params)
    mesh = programs.mesh
    # Split over `tensor`, a matrix keeps its dimensions: there is one to split in each.
    turn = programs.on_cpu and mesh.shape["tensor"] == 1
    return _turned(programs, made) if turn and rows <= linear.FEW and not int8 else made


def take(programs: Programs, config: ModelConfig, params: Params, *, int8: bool = False) -> Params:
    """The parameters in the sampler's layout, in place of those given, which are deleted.

    Each is deleted when its copy is there: memory holds one of them twice (of all layers of a
    kind), not all. What `decode_weights` would share is the same array before and after.
    """
    if laid_out(params):
        return params
    return _Layout(programs, config, int8).made(params, delete=True)


def laid_out(params: Params) -> bool:
    """Whether the parameters are in the sampler's layout."""
    return isinstance(params["blocks"], tuple)


class _Layout:
    """How parameters are laid out for decoding on a mesh."""

    def __init__(self, programs: Programs, config: ModelConfig, int8: bool):
        self.programs, self.mesh, self.int8 = programs, programs.mesh, int8
        self.dtype, self.config = jnp.dtype(config.compute_dtype), config
        # Without the leading axis of layers; all layers have the same.
        self.axes = {
            spec.path[-1]: spec.axes[1:] if spec.stacked else spec.axes
            for spec in param_table(config)
        }

    def made(self, params: Params, *, delete: bool = False) -> Params:
        """The parameters, laid out; `delete`: one after the other, those given are deleted."""
        whole = {name: params[name] for name in ("embed", "final_norm", "head") if name in params}
        given = {(name,): w for name, w in whole.items() if not self._fits(name, w)} | {
            (part, slot, name): value
            for part in ("blocks", "rest")
            for slot, layers in params.get(part, {}).items()
            for name, value in layers.items()
        }
        found: dict[tuple[str, ...], Any] = {}
        if delete:
            for path, value in given.items():
                # All layers of a block by one program.
                path_of_all = path if len(path) == 1 else (path[0], "layer", path[-1])
                part = self._run({path_of_all: value})
                found[path] = jax.block_until_ready(part)[path_of_all]
                for leaf in jax.tree.leaves(value):
                    leaf.delete()
        else:
            found = self._run(given)
        made: Params = {name: found.get((name,), w) for name, w in whole.items()}
        if self.int8:
            made["head"] = self._int8_head(output_matrix(made))
        made["blocks"] = tuple(
            {slot: self._block(found, index, slot) for slot in slots}
            for index, slots in enumerate(self.config.blocks)
        )
        return made

    def _block(self, found: dict[tuple[str, ...], Any], index: int, slot: str) -> Params:
        """One layer of a block, out of the tuples that have each parameter of all blocks."""
        part, at = ("blocks", index) if index < self.config.num_blocks else ("rest", 0)
        return {path[-1]: values[at] for path, values in found.items() if path[:-1] == (part, slot)}

    def _run(self, given: dict[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
        return self.programs.run("weights", (self.int8, _form(given)), self._convert, given)

    def _int8_head(self, embed: jax.Array) -> Int8:
        return self.programs.run(
            "int8 head", _form(embed), lambda embed: linear.int8(embed.T, 1), embed
        )

    def _convert(self, given: dict[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
        """By path; of what is stacked over layers, a tuple of one a block."""
        found: dict[tuple[str, ...], Any] = {}
        for path, value in given.items():
            name = path[-1]
            if len(path) == 1:
                found[path] = self._keep(value, name, self.axes[name])
            else:
                blocks = self.config.num_blocks if path[0] == "blocks" else 1
                found[path] = tuple(
                    self._layer(jax.tree.map(lambda x, block=block: x[block], value), name)
                    for block in range(blocks)
                )
        return found

    def _layer(self, w: Any, name: str) -> Any:
        names = self.axes[name]
        if name not in INPUTS:
            return self._keep(w, name, names)
        if isinstance(w, LowRank):
            split = INPUTS[name]
            a = self._keep(w.a, name, (*names[:split], None))
            b = self._keep(w.b, name, (None, *names[split:]))
            return LowRank(self._matrix(w.w, name), a, b, w.scale)
        return self._matrix(w, name)

    def _matrix(self, w: Any, name: str) -> jax.Array | Int8:
        w = self._keep(w, name, self.axes[name])
        return linear.int8(w, INPUTS[name]) if self.int8 else w

    def _keep(self, w: jax.Array, name: str, names: tuple[str | None, ...]) -> jax.Array:
        w = w.astype(self._dtype_of(name, w))
        return jax.lax.with_sharding_constraint(w, self._place(names))

    def _fits(self, name: str, w: jax.Array) -> bool:
        """Whether a parameter that is not stacked is already as decoding wants it."""
        same = w.dtype == self._dtype_of(name, w)
        return same and w.sharding.is_equivalent_to(self._place(self.axes[name]), w.ndim)

    def _dtype_of(self, name: str, w: jax.Array) -> jnp.dtype:
        # Norms and biases are small and read in float32, as the trainer reads its masters.
        return self.dtype if name in INPUTS or name in ("embed", "head") else w.dtype

    def _place(self, names: tuple[str | None, ...]) -> NamedSharding:
        return sharding(self.mesh, [None if name == "embed" else name for name in names])


def _turned(programs: Programs, weights: Params) -> Params:
    """Laid-out weights with matrices stored the other way round; all else is shared."""

    def base(w: Any) -> Any:
        return w.w if isinstance(w, LowRank) else w

    def turn(matrices: tuple[Params, ...]) -> tuple[Params, ...]:
        def one(name: str, w: jax.Array) -> OutMajor:
            split = INPUTS[name]
            return OutMajor(w.reshape(math.prod(w.shape[:split]), -1).T, w.shape[split:])

        def layers(block: Params) -> Params:
            return {
                slot: {name: one(name, w) for name, w in layer.items()}
                for slot, layer in block.items()
            }

        return tuple(layers(block) for block in matrices)

    matrices = tuple(
        {slot: {name: base(layer[name]) for name in INPUTS} for slot, layer in block.items()}
        for block in weights["blocks"]
    )
    turned = programs.run("turn weights", _form(matrices), turn, matrices)

    def layer(old: Params, new: Params) -> Params:
        """With the adapters that matrices had."""
        return old | {
            name: old[name].replace(w=w) if isinstance(old[name], LowRank) else w
            for name, w in new.items()
        }

    blocks = tuple(
        {slot: layer(old[slot], new[slot]) for slot in old}
        for old, new in zip(weights["blocks"], turned, strict=True)
    )
    # The head, which may be the embedding, is [vocabulary, embed] already: nothing to copy.
    head = output_matrix(weights)
    return weights | {"blocks": blocks, "head": OutMajor(head, (head.shape[0],))}


def _form(tree: Any) -> Hashable:
    """What a program depends on besides the model's shape and the mesh."""
    return jax.tree.structure(tree), tuple(str(leaf.dtype) for leaf in jax.tree.leaves(tree))
