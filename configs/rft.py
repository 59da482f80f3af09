"""Rejective fine-tuning."""

from _shared import sampling, setup

from grm_jax.recipes import RFT, Fitting, OptimizerConfig, RFTRecipe

TINY = RFT(
    records=1500,
    samples=3,
    sampling=sampling("tiny"),
    fitting=Fitting(
        steps=60,
        batch_size=28,
        optimizer=OptimizerConfig(
            learning_rate=5e-4, schedule="cosine", warmup_steps=10, weight_decay=0.01
        ),
    ),
)
# The paper: N_RFT 3, one hinted sample, lr 5e-6, batch 1024, 900 steps.
PAPER = RFT(
    samples=3,
    sampling=sampling("27b"),
    fitting=Fitting(
        steps=900,
        batch_size=1024,
        device_batch=4,
        optimizer=OptimizerConfig(learning_rate=5e-6, schedule="cosine", warmup_steps=30),
    ),
)


def stage(size: str) -> RFT:
    return TINY if size == "tiny" else PAPER


def get_config(size: str) -> RFTRecipe:
    return RFTRecipe(setup=setup(size), rft=stage(size))
