"""Traffic between devices, read from compiled programs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from grm_jax.parallel.mesh import sharding, use_mesh
from grm_jax.planning.hlo import collective_bytes

PRETEND = """HloModule m

%branch (q: f32[4]) -> f32[4] {
  %rs = f32[4]{0} reduce-scatter(%z), channel_id=7, to_apply=%add
}

%other (q: f32[4]) -> f32[4] {
  %again = f32[4]{0} reduce-scatter(%z), channel_id=7, to_apply=%add
  %ata = f32[6]{0} all-to-all(%z), channel_id=8
}

%inner (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %ag = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%x), dimensions={0}
  %done = f32[8,4]{1,0} all-gather-done(%ag)
}

%test (p: (s32[], f32[8,4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%counted (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %cp = f32[2]{0} collective-permute(%x), channel_id=9
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %w = (s32[], f32[8,4]) while(%t), body=%inner, backend_config={"known_trip_count":{"n":"13"}}
  %v = (s32[], f32[8,4]) while(%t), condition=%test, body=%counted
  %c = f32[4]{0} conditional(%k, %y, %y), branch_computations={%branch, %other}
  ROOT %r = bf16[16]{0} all-reduce(%y), to_apply=%add
}
"""


def test_loops_count_as_often_as_they_run():
    found = collective_bytes(PRETEND)
    assert found["all-gather"] == 13 * 8 * 4 * 4
    assert found["all-reduce"] == 16 * 2
    assert found["reduce-scatter"] == 4 * 4, "two places, one channel"
    assert found["collective-permute"] == 5 * 2 * 4, "by its condition"
    assert found["all-to-all"] == 6 * 4, "the second branch"


def test_a_real_program(mesh_of):
    """A product over a split dimension: its result is summed over four devices, five times."""
    mesh = mesh_of(1, 4, 1)
    rows = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=sharding(mesh, (None, "embed")))
    matrix = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=sharding(mesh, ("embed", None)))

    def repeat(x, w):
        def body(x, _):
            y = jax.lax.with_sharding_constraint(x @ w, sharding(mesh, (None, None)))
            return jax.lax.with_sharding_constraint(y, sharding(mesh, (None, "embed"))), None

        return jax.lax.scan(body, x, None, length=5)[0]

    with use_mesh(mesh):
        text = jax.jit(repeat).lower(rows, matrix).compile().as_text()
    assert sum(collective_bytes(text).values()) == pytest.approx(5 * 8 * 64 * 4)
