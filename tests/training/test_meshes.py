"""Every stage's step, rollout and scores on meshes of eight devices are those of one device.

Run as a script it computes them, on eight virtual devices, and prints the largest differences.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# replica, fsdp, sequence, tensor
MESHES = {
    "1x8": (1, 1, 1, 8), "2x4": (1, 2, 1, 4), "4x2": (1, 4, 1, 2), "8x1": (1, 8, 1, 1),
    "2x2x2": (2, 2, 1, 2), "sequence": (1, 2, 2, 2),
}  # fmt: skip
STEPS = ("sft", "rl", "lora", "meta_rm")  # the baseline's is like the last


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("what", [*STEPS, "scores"])
@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_computes_what_one_device_does(mesh, what, found):
    """Of the largest change of a parameter (or of the largest score), 1e-4 at most."""
    assert found[mesh][what] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_a_rollout_draws_the_same_tokens(mesh, found):
    assert found[mesh]["tokens that differ"] == 0
    assert found[mesh]["logprobs"] < 1e-4


def main() -> None:
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    expected = results(None)
    differences = {name: compare(results(shape), expected) for name, shape in MESHES.items()}
    print(json.dumps(differences))


def results(shape) -> dict:
    """What every stage computes on a mesh, as host arrays."""
    import types

    import jax
    import numpy as np
    import optax

    from grm_jax.data.collate import Example, collate, collate_groups
    from grm_jax.judge.scalar import score_examples
    from grm_jax.model.batch import completion_logprobs, row_scores
    from grm_jax.model.config import ModelConfig
    from grm_jax.model.lora import adapter_table, attach
    from grm_jax.model.options import LoRAConfig
    from grm_jax.model.params import init_params, param_table
    from grm_jax.model.storage import param_shardings
    from grm_jax.parallel.mesh import decode_mesh, make_mesh
    from grm_jax.sampler.engine import Sampler
    from grm_jax.sampler.options import EngineConfig, SamplingConfig
    from grm_jax.sampler.schedule import Request
    from grm_jax.training.losses import bce_loss, sft_loss
    from grm_jax.training.options import RL
    from grm_jax.training.rl import by_length, policy_objective
    from grm_jax.training.setup import Setup
    from grm_jax.training.step import init_state, make_train_step

    if shape is None:
        mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    else:
        replica, fsdp, sequence, tensor = shape
        mesh = make_mesh(replica, fsdp, tensor, sequence=sequence)
    model = ModelConfig(
        num_layers=2, embed_dim=32, num_heads=8, num_kv_heads=8, head_dim=8, hidden_dim=64,
        query_pre_attn_scalar=12, vocab_size=64, sliding_window=6, max_position=96,
        attn_softcap=8.0, final_softcap=10.0,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    setup = Setup(remat="block", logprob_chunk=6)
    rl = RL(kl_coef=0.3, sampling=SamplingConfig(temperature=0.8))
    run = types.SimpleNamespace(model=model, setup=setup)
    # Rows and groups of unequal lengths; the last groups have no rollouts.
    examples = [
        Example(
            tuple(rng.integers(4, 60, rng.integers(2, 9)).tolist()),
            tuple(rng.integers(4, 60, rng.integers(1, 13)).tolist()),
            float(i % 2),
        )
        for i in range(16)
    ]
    rows = collate(examples, length=24, completion=12)
    groups = collate_groups(
        [rng.integers(4, 60, rng.integers(2, 9)).tolist() for _ in range(16)],
        [[rng.integers(4, 60, rng.integers(1, 13)).tolist() for _ in range(2)] for _ in range(16)],
        length=12,
        completion=12,
    )
    for name in ("old", "reference"):
        groups[name] = -rng.uniform(1, 4, groups["mask"].shape).astype(np.float32)
    groups["advantages"] = rng.normal(size=(16, 2)).astype(np.float32)
    groups["mask"] *= (np.arange(16) < 11)[:, None, None]
    table, scalar = param_table(model), param_table(model, num_labels=1)
    lora = LoRAConfig(rank=4)
    adapters = adapter_table(table, lora)

    def whole(table, seed):
        params = init_params(table, jax.random.key(seed))
        keys = iter(jax.random.split(jax.random.key(seed + 1), 200))
        params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)
        return jax.device_put(params, param_shardings(table, mesh))

    def language(params, frozen, batch):
        del frozen
        logprobs, _ = completion_logprobs(
            params, model, batch, temperature=1.0, remat="block", chunk=5
        )
        return sft_loss(logprobs, batch["mask"])

    def meta(params, frozen, batch):
        del frozen
        scores = row_scores(params, model, batch["tokens"], batch["lengths"])
        return bce_loss(scores, batch["labels"], batch["mask"][:, 0])

    base = whole(table, 0)
    policy = policy_objective(run, rl)  # pyright: ignore[reportArgumentType]
    cases = {
        "sft": (language, table, base, rows, 2),
        "rl": (policy, table, base, groups, 2),
        "lora": (
            lambda p, frozen, batch: language(attach(frozen, p, table, 2.0), None, batch),
            adapters, whole(adapters, 5), rows, 1,
        ),
        "meta_rm": (meta, scalar, whole(scalar, 3), rows, 1),
    }  # fmt: skip
    made = {}
    for name, (loss, trained, params, batch, parts) in cases.items():
        before = jax.device_get(params)
        cut = by_length if name == "rl" else None
        step = make_train_step(loss, optax.sgd(1.0), trained, mesh, micro_batches=parts, cut=cut)
        state = init_state(trained, optax.sgd(1.0), mesh, params=params)
        state, _ = step(state, base if name == "lora" else None, batch)
        made[name] = jax.tree.map(np.subtract, jax.device_get(state.params), before)
    made["scores"] = score_examples(whole(scalar, 3), model, examples, (24,), 8, mesh)
    sampler = Sampler(model, [1], EngineConfig(max_rows=16, page=8, chunk=4), decode_mesh(mesh))
    requests = [Request(str(i), e.prompt, (0, 1, 2)) for i, e in enumerate(examples)]
    drawn = sampler.sample(base, requests, SamplingConfig(max_new_tokens=10), jax.random.key(7))
    samples = sorted(drawn, key=lambda s: (s.example_id, s.index))
    made["tokens"] = [s.tokens.tolist() for s in samples]
    made["logprobs"] = np.concatenate([s.logprobs for s in samples])
    return made


def compare(found: dict, expected: dict) -> dict[str, float]:
    import jax
    import numpy as np

    def far(a, b) -> float:
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        largest = max(float(np.abs(y).max()) for y in jax.tree.leaves(b))
        assert largest > 1e-3
        return max(float(np.abs(x - y).max()) for x, y in pairs) / largest

    apart = {name: far(found[name], expected[name]) for name in (*STEPS, "scores")}
    differ = sum(a != b for a, b in zip(found["tokens"], expected["tokens"], strict=True))
    apart["tokens that differ"] = float(differ)
    same = found["logprobs"].shape == expected["logprobs"].shape
    apart["logprobs"] = far(found["logprobs"], expected["logprobs"]) if same else 1.0
    return apart


if __name__ == "__main__":
    main()
