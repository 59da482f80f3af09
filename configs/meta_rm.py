"""The meta RM: a scalar head that judges critiques."""

from _shared import sampling, setup

from grm_jax.recipes import Fitting, MetaRM, MetaRMRecipe, OptimizerConfig

# From the supervised weights, which still see every check; RL has narrowed its own.
TINY = MetaRM(
    start="sft",
    records=400,
    samples=3,
    rollouts=True,
    holdout=0.03,
    sampling=sampling("tiny"),
    fitting=Fitting(
        steps=280,
        batch_size=48,
        optimizer=OptimizerConfig(
            name="muon", learning_rate=5e-3, schedule="cosine", warmup_steps=20, weight_decay=0.01
        ),
    ),
)
# The paper: from the base model, lr 1e-5, batch 512 (its number of steps is not given).
PAPER = MetaRM(
    sampling=sampling("27b"),
    fitting=Fitting(
        steps=900,
        batch_size=512,
        device_batch=4,
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", warmup_steps=30),
    ),
)


def stage(size: str) -> MetaRM:
    return TINY if size == "tiny" else PAPER


def get_config(size: str) -> MetaRMRecipe:
    return MetaRMRecipe(setup=setup(size), meta_rm=stage(size))
