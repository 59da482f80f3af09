"""The Bradley-Terry baseline."""

from _shared import setup

from grm_jax.recipes import Fitting, OptimizerConfig, ScalarRM, ScalarRMRecipe

TINY = ScalarRM(
    start="sft",
    fitting=Fitting(
        steps=450,
        batch_size=32,
        optimizer=OptimizerConfig(
            name="muon", learning_rate=5e-3, schedule="cosine", warmup_steps=20, weight_decay=0.01
        ),
    ),
)
PAPER = ScalarRM(
    fitting=Fitting(
        steps=900,
        batch_size=256,
        device_batch=2,
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", warmup_steps=30),
    ),
)


def stage(size: str) -> ScalarRM:
    return TINY if size == "tiny" else PAPER


def get_config(size: str) -> ScalarRMRecipe:
    return ScalarRMRecipe(setup=setup(size), scalar_rm=stage(size))
