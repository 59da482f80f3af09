r"""The meta RM (arXiv:2504.02495, section 4): a scalar head that judges critiques.

It reads the query, the responses and a critique, and learns by binary cross-entropy whether the
critique's scores are correct by Eq. 10. When k critiques vote, the k/2 that it puts highest count
(`grm_jax.evaluate --meta`; other shares: `--k-meta`).

    python -m grm_jax.train --config meta_rm.py
    python -m grm_jax.train --config meta_rm.py:27b --base google/gemma-2-27b \
        --tokenizer google/gemma-2-27b-it --preferences preferences.jsonl

Both learn from what `rft.py` sampled in the same run directory and from critiques that the model of
`rl.py` there (or `--init MODEL`) writes for it; the first also from the rollouts of `rl.py`.

What it reached: the tiny model tells correct from wrong critiques of held-out records with a
ROC-AUC of 0.881 (0.870 to 0.890), within a record of 0.857 (0.836 to 0.872), after two to three
minutes of this stage (commit 7bc00a2). Guiding 32 votes by it makes no difference: 0.0 points (-0.4
to 0.3). Each figure is the mean of three seeds with the lowest and the highest, made at commit
c8c3b08, one core a seed, by

    python experiments/spct/seeds.py --seeds 0 1 2 --jobs 2

The 27b recipe has not been run. In the paper guiding 32 votes raises the overall score from 71.0 to
72.8 (Table 2).
"""

from _shared import SMALL_SIZES, setup

from grm_jax.model.config import TINY_SIZES
from grm_jax.recipes import Fitting, MetaRM, MetaRMRecipe, OptimizerConfig, SamplingConfig

TINY = MetaRM(
    start="sft",  # its weights still see every check; RL has narrowed its own
    tie="paper",
    rft_trajectories=True,
    records=400,
    samples=3,
    rollouts=True,
    holdout=0.03,
    sampling=SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, max_new_tokens=64),
    fitting=Fitting(
        steps=280,
        batch_size=48,
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

PAPER = MetaRM(
    start="base",  # Figure 5
    tie="paper",
    rft_trajectories=True,  # those without a hint, correct and wrong: section 4, appendix C.1
    records=None,  # all; how many is not given in the paper
    samples=3,  # of the GRM to be guided: section 4, appendix C.1
    rollouts=False,
    holdout=0.05,  # not given in the paper
    # Not given in the paper. Here nothing is filtered.
    sampling=SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, max_new_tokens=1024),
    fitting=Fitting(
        steps=900,  # not given in the paper
        batch_size=512,  # appendix C.1
        device_batch=4,
        optimizer=OptimizerConfig(
            learning_rate=1e-5,  # appendix C.1
            # The rest is not given in the paper.
            name="adamw",
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

SMALL = MetaRM(
    start="base",
    tie="paper",
    rft_trajectories=True,
    records=100,
    samples=3,
    rollouts=True,
    holdout=0.05,
    sampling=SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, max_new_tokens=80),
    fitting=Fitting(
        steps=60,
        batch_size=16,
        device_batch=8,
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


def stage(size: str) -> MetaRM:
    if size in SMALL_SIZES:
        return SMALL
    return TINY if size in TINY_SIZES else PAPER


def get_config(size: str) -> MetaRMRecipe:
    return MetaRMRecipe(setup=setup(size), meta_rm=stage(size))
