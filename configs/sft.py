"""Supervised cold start."""

from _shared import setup

from grm_jax.recipes import SFT, Fitting, OptimizerConfig, SFTRecipe

# From random weights in minutes: Muon learns the checks about 1.5 times faster than AdamW.
TINY = SFT(
    fitting=Fitting(
        steps=850,
        batch_size=28,
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=1e-2,
            schedule="cosine",
            warmup_steps=60,
            weight_decay=0.01,
        ),
    )
)
# The paper's supervised stage: lr 5e-6, batch 1024, 900 steps.
PAPER = SFT(
    fitting=Fitting(
        steps=900,
        batch_size=1024,
        device_batch=4,
        optimizer=OptimizerConfig(learning_rate=5e-6, schedule="cosine", warmup_steps=30),
    )
)


def stage(size: str) -> SFT:
    return TINY if size == "tiny" else PAPER


def get_config(size: str) -> SFTRecipe:
    return SFTRecipe(setup=setup(size), sft=stage(size))
