"""Rule-based online RL: GRPO with a KL penalty."""

import dataclasses

from _shared import sampling, setup

from grm_jax.recipes import RL, ConfigError, OptimizerConfig, RLRecipe

# tie="expected": with the paper's rule this small policy learns false alarms that break ties.
TINY = RL(
    steps=100,
    prompts=32,
    group=8,
    kl_coef=0.02,
    tie="expected",
    train_groups=32,
    aggregation="token",
    device_batch=4,
    sampling=sampling("tiny"),
    optimizer=OptimizerConfig(learning_rate=2e-4, b2=0.99, warmup_steps=8),
)
# The paper: G 4, beta 0.08 (27B), lr 4e-7, batch 512 (taken as rollouts), 900 steps.
PAPER = RL(
    steps=900,
    prompts=128,
    group=4,
    kl_coef=0.08,
    device_batch=1,
    sampling=sampling("27b"),
    optimizer=OptimizerConfig(learning_rate=4e-7, warmup_steps=10),
)


def stage(size: str) -> RL:
    return TINY if size == "tiny" else PAPER


def get_config(size: str, *, group: int | None = None, lr: float | None = None) -> RLRecipe:
    """The recipe of a size. `group`: critiques a prompt, from fewer or more prompts, so that a step
    keeps its number of rollouts. `lr`: the peak learning rate.

    Raises ConfigError for a group that does not divide the rollouts of a step.
    """
    rl = stage(size)
    if group is not None:
        rollouts = rl.prompts * rl.group
        if group < 2 or rollouts % group:
            raise ConfigError(f"group={group}: give 2 or more that divide {rollouts} rollouts")
        prompts = rollouts // group
        train_groups = None if rl.train_groups is None else prompts
        rl = dataclasses.replace(rl, group=group, prompts=prompts, train_groups=train_groups)
    if lr is not None:
        optimizer = dataclasses.replace(rl.optimizer, learning_rate=lr)
        rl = dataclasses.replace(rl, optimizer=optimizer)
    return RLRecipe(setup=setup(size), rl=rl)
