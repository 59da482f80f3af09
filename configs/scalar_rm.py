r"""The Bradley-Terry baseline: a scalar head that scores a response.

It has the backbone of the judge and learns from the same preferences, a pair of responses at a
time, but writes no critique, so there is nothing to sample and to vote on. In the paper
(arXiv:2504.02495, appendix C) it is DeepSeek-BTRM-27B.

    python -m grm_jax.train --config scalar_rm.py
    python -m grm_jax.train --config scalar_rm.py:27b --base google/gemma-2-27b \
        --tokenizer google/gemma-2-27b-it --preferences preferences.jsonl

The first starts from the model that `sft.py` left in the same run directory, the second from
`--base`; `--init MODEL` starts from another.

What it reached: the tiny model judges 89.1% (83.3 to 92.5) of 1,000 held-out records correctly,
after one and a half minutes of this stage (commit 7bc00a2). That is more than 32 votes of the RL
model. Each figure is the mean of three seeds with the lowest and the highest, made at commit
c8c3b08, one core a seed, by

    python experiments/spct/seeds.py --seeds 0 1 2 --jobs 2

The 27b recipe has not been run. The paper's model has 68.6 overall (Table 2).
"""

from _shared import SMALL_SIZES, setup

from grm_jax.model.config import TINY_SIZES
from grm_jax.recipes import Fitting, OptimizerConfig, ScalarRM, ScalarRMRecipe

TINY = ScalarRM(
    start="sft",
    fitting=Fitting(
        steps=450,
        batch_size=32,
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=5e-3,
            adam_scale=0.3,
            schedule="cosine",
            warmup_steps=20,
            final_fraction=0.05,
            b1=0.9,
            b2=0.98,
            weight_decay=0.01,
            decayed="all",
            clip_norm=1.0,
        ),
    ),
)

PAPER = ScalarRM(
    start="base",  # Gemma-2-27B: appendix C
    # All below is not given in the paper; the learning rate is the meta RM's.
    fitting=Fitting(
        steps=900,
        batch_size=256,
        device_batch=2,
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=1e-5,
            schedule="cosine",
            warmup_steps=30,
            final_fraction=0.05,
            b1=0.9,
            b2=0.98,
            weight_decay=0.0,
            decayed="all",
            clip_norm=1.0,
        ),
    ),
)

# Half a pass over 2,500 pairs.
SMALL = ScalarRM(
    start="base",
    fitting=Fitting(
        steps=78,
        batch_size=16,
        device_batch=4,
        optimizer=OptimizerConfig(
            learning_rate=5e-5,
            name="adamw",
            schedule="cosine",
            warmup_steps=10,
            final_fraction=0.05,
            b1=0.9,
            b2=0.98,
            weight_decay=0.0,
            decayed="all",
            clip_norm=1.0,
        ),
    ),
)


def stage(size: str) -> ScalarRM:
    if size in SMALL_SIZES:
        return SMALL
    return TINY if size in TINY_SIZES else PAPER


def get_config(size: str) -> ScalarRMRecipe:
    return ScalarRMRecipe(setup=setup(size), scalar_rm=stage(size))
