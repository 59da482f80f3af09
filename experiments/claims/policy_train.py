"""A tiny policy trained by GRPO with a judge's rewards, on queries of the embedded world.

    python experiments/claims/policy_train.py --start RUNS/0-policy/sft --judge RUNS/0 \\
        --reward votes --k 8 --output RUNS/0-policy/votes-8.jsonl

    query -> G responses of the policy -> one verdict on all -> advantages -> GRPO step

The world knows what each response is truly worth (10 less what its faults cost), which the policy
never sees. Each line of the output has a step, the mean reward that the judge gave, and the mean
true score of the same responses. A KL penalty keeps the policy near its start.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from grm_jax import Judge
from grm_jax.critique.voting import hybrid_scores
from grm_jax.data.collate import collate_groups
from grm_jax.data.synthetic import Item, check_response, make_item
from grm_jax.files import written_whole
from grm_jax.model.batch import group_logprobs
from grm_jax.model.params import Params, param_table
from grm_jax.model.storage import (
    load_params,
    on_devices,
    param_shardings,
    read_model_config,
)
from grm_jax.parallel.mesh import make_mesh, use_mesh
from grm_jax.sampler.engine import Sampler
from grm_jax.sampler.options import EngineConfig, SamplingConfig
from grm_jax.sampler.schedule import Request, Sample
from grm_jax.tokenizer import load_tokenizer
from grm_jax.training.losses import group_advantages, grpo_loss
from grm_jax.training.optimizer import make_optimizer
from grm_jax.training.options import OptimizerConfig

Reward = Literal["votes", "guided", "scalar", "sum", "truth"]
LONGEST = 12  # tokens of a response, its end included
PROMPT = 24  # tokens of a query, in the chat format


@dataclasses.dataclass(frozen=True)
class Arguments:
    start: Path
    """The directory of the stage whose model the policy starts from."""
    judge: Path
    """A finished pipeline: its RL model judges, with its meta RM and its scalar RM."""
    output: Path
    reward: Reward = "votes"
    """votes: mean scores of k critiques; guided: of those that the meta RM ranks highest; scalar:
    the scalar RM's score; sum: votes plus half of the scalar score; truth: the true score."""
    k: int = 8
    steps: int = 100
    queries: int = 16
    """Queries a step."""
    group: int = 4
    """G: responses to a query. The judge sees all of them at once."""
    kl_coef: float = 0.02
    learning_rate: float = 1e-3
    seed: int = 0


Rewarder = Callable[[Sequence[Item], Sequence[Sequence[str]], int], np.ndarray]


def main(args: Arguments) -> None:
    mesh = make_mesh()
    folder = args.start / "model"
    config, tokenizer = (
        on_devices(read_model_config(folder), mesh, "float32"),
        load_tokenizer(folder),
    )
    table = param_table(config)
    _, params = load_params(folder, shardings=param_shardings(table, mesh), dtype=jnp.float32)
    engine = EngineConfig(max_rows=args.queries * args.group)
    sampler = Sampler(config, tokenizer.stop_ids, engine, mesh)
    sampling = SamplingConfig(
        temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, max_new_tokens=LONGEST
    )
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=args.learning_rate, b2=0.99, warmup_steps=5),
        args.steps,
        table,
    )
    state, reference = optimizer.init(params), params
    reward, rng = rewarder(args), random.Random(f"{args.seed} policy")
    options: dict[str, Any] = {"temperature": 1.0, "remat": "none", "chunk": 512}

    @jax.jit
    def step(params: Params, state: Any, batch: dict[str, jax.Array]):
        expected, _ = group_logprobs(reference, config, batch, **options)

        def loss(params: Params) -> jax.Array:
            logprobs, _ = group_logprobs(params, config, batch, **options)
            flat = [x.reshape(-1, x.shape[-1]) for x in
                    (logprobs, batch["old"], expected, batch["mask"])]  # fmt: skip
            found = grpo_loss(
                flat[0], flat[1], flat[2], batch["advantages"].reshape(-1), flat[3],
                clip_low=0.2, clip_high=0.2, kl_coef=args.kl_coef, aggregation="token",
            )  # fmt: skip
            return found.total / found.count

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    rows = []
    with use_mesh(mesh):
        for number in range(args.steps + 1):
            items = [make_item(rng, 2) for _ in range(args.queries)]
            key = jax.random.fold_in(jax.random.key(args.seed), number)
            groups = sampled(sampler, params, tokenizer, items, args.group, sampling, key, number)
            texts = [[tokenizer.decode(s.tokens) for s in group] for group in groups]
            rewards = reward(items, texts, number)
            true = np.asarray(
                [[truth(i, t) for t in each] for i, each in zip(items, texts, strict=True)]
            )
            rows.append(
                {"step": number, "reward": float(rewards.mean()), "truth": float(true.mean()),
                 "perfect": float((true == 10.0).mean())}
            )  # fmt: skip
            if number % 10 == 0:
                print(f"{args.reward} {args.k}  step {number}/{args.steps}  {rows[-1]}", flush=True)
            if number < args.steps:
                batch = collated(items, groups, tokenizer, rewards)
                params, state = step(params, state, jax.tree.map(jnp.asarray, batch))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(args.output) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def truth(item: Item, response: str) -> float:
    """10 less what the faults of a response cost."""
    checks = check_response(item, response.split())
    return 10.0 - Item(item.task, item.operands, item.asked, (), (checks,)).penalties[0]


def prompt_ids(tokenizer: Any, item: Item) -> tuple[int, ...]:
    return tuple(tokenizer.chat([{"role": "user", "content": item.query}]))


def sampled(
    sampler: Sampler, params: Params, tokenizer: Any, items: Sequence[Item], group: int,
    sampling: SamplingConfig, key: jax.Array, number: int,
) -> list[list[Sample]]:  # fmt: skip
    """G responses to each query."""
    requests = [
        Request(f"{number}-{i}", prompt_ids(tokenizer, item), tuple(range(group)))
        for i, item in enumerate(items)
    ]
    found: dict[str, list[Sample]] = {request.example_id: [] for request in requests}
    for sample in sampler.sample(params, requests, sampling, key):
        found[sample.example_id].append(sample)
    return [sorted(found[r.example_id], key=lambda sample: sample.index) for r in requests]


def collated(
    items: Sequence[Item], groups: Sequence[Sequence[Sample]], tokenizer: Any, rewards: np.ndarray
) -> dict[str, np.ndarray]:
    """The batch of a step: see `collate_groups`; advantages [N, G], old [N, G, C]."""
    batch = collate_groups(
        [prompt_ids(tokenizer, item) for item in items],
        [[sample.tokens.tolist() for sample in group] for group in groups],
        length=PROMPT, completion=LONGEST,
    )  # fmt: skip
    old = np.zeros_like(batch["mask"])
    for n, group in enumerate(groups):
        for g, sample in enumerate(group):
            old[n, g, : len(sample.logprobs)] = sample.logprobs
    advantages = np.asarray(group_advantages(jnp.asarray(rewards, jnp.float32)))
    return {**batch, "old": old, "advantages": advantages}


def rewarder(args: Arguments) -> Rewarder:
    """(items, responses, step) -> rewards [N, G]. A verdict without a readable critique is 0."""
    if args.reward == "truth":
        return lambda items, texts, _: np.asarray(
            [[truth(i, t) for t in each] for i, each in zip(items, texts, strict=True)]
        )
    needs_scalar = args.reward in ("scalar", "sum")
    judge = Judge.load(
        args.judge,
        args.judge if args.reward == "guided" else None,
        args.judge if needs_scalar else None,
    )

    def ask(items: Sequence[Item], texts: Sequence[Sequence[str]], step: int) -> np.ndarray:
        asked = [
            {
                "query": item.query, "responses": [t or " none" for t in each],
                "k": 1 if args.reward == "scalar" else args.k, "seed": step,
                "method": "guided" if args.reward == "guided" else "vote",
            }
            for item, each in zip(items, texts, strict=True)
        ]  # fmt: skip
        found = []
        for verdict in judge.score_many(asked):
            scores = list(verdict.scores) or [0.0] * args.group
            if args.reward == "scalar":
                scores = list(verdict.scalar or scores)
            elif args.reward == "sum" and verdict.scalar is not None:
                scores = hybrid_scores(scores, verdict.scalar)
            found.append(scores)
        return np.asarray(found)

    return ask


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
