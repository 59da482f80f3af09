r"""Supervised cold start: next-token loss on the replies of instruction data and of critiques.

The paper (arXiv:2504.02495) has no such stage. It trains the base model on 1,070K rows of general
instruction data and 186K sampled critiques at once (appendix C.1), the latter written by another
model. Here the base model learns from rows of yours first, so that it can sample for `rft.py`
itself. A model that already follows instructions needs no cold start: give it to `rft.py` with
`--init`.

    python -m grm_jax.train --config sft.py
    python -m grm_jax.train --config sft.py:27b --base google/gemma-2-27b \
        --tokenizer google/gemma-2-27b-it --instructions instructions.jsonl

The base model's own tokenizer has no chat template, so the second command takes another one.

The sizes gemma3_270m and smollm2_135m need no rows of yours: without --instructions the base model
writes critiques of the preference records, and learns from those that agree with the labels.

What it reached: the tiny model judges 62.1% (61.3 to 63.1) of 1,000 held-out records correctly when
greedy, and 85.0% (82.0 to 87.2) with 32 votes, after about four minutes of this stage (commit
7bc00a2). Each figure is the mean of three seeds with the lowest and the highest, made at commit
c8c3b08, one core a seed, by

    python experiments/spct/seeds.py --seeds 0 1 2 --jobs 2

The 27b recipe has not been run.
"""

from _shared import SMALL_SIZES, setup

from grm_jax.model.config import TINY_SIZES
from grm_jax.recipes import SFT, ColdStart, Fitting, OptimizerConfig, SamplingConfig, SFTRecipe

# A teacher's critiques are there: --instructions.
NONE = ColdStart(many=None)

TINY = SFT(
    fitting=Fitting(
        steps=850,
        batch_size=28,
        optimizer=OptimizerConfig(
            # From random weights it learns the checks about 1.5 times faster than AdamW.
            name="muon",
            learning_rate=1e-2,
            adam_scale=0.3,
            schedule="cosine",
            warmup_steps=60,
            final_fraction=0.05,
            b1=0.9,
            b2=0.98,
            weight_decay=0.01,
            decayed="all",
            clip_norm=1.0,
        ),
    ),
    cold_start=NONE,
)

PAPER = SFT(
    fitting=Fitting(
        steps=900,  # of RFT: appendix C.1
        batch_size=1024,  # of RFT: appendix C.1
        device_batch=4,
        optimizer=OptimizerConfig(
            learning_rate=5e-6,  # of RFT: appendix C.1
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
    cold_start=NONE,
)

# About three passes over what the base model writes: one critique in seven is kept, and most of the
# others have no box within 64 tokens.
SMALL = SFT(
    fitting=Fitting(
        steps=45,
        batch_size=16,
        device_batch=8,
        optimizer=OptimizerConfig(
            learning_rate=1e-4,
            name="adamw",
            schedule="cosine",
            warmup_steps=5,
            final_fraction=0.05,
            b1=0.9,
            b2=0.98,
            weight_decay=0.0,
            decayed="all",
            clip_norm=1.0,
        ),
    ),
    cold_start=ColdStart(
        many="short_examples",
        single="short_single_examples",
        records=400,
        samples=4,
        sampling=SamplingConfig(temperature=0.8, top_k=0, top_p=1.0, min_p=0.0, max_new_tokens=64),
    ),
)


def stage(size: str) -> SFT:
    if size in SMALL_SIZES:
        return SMALL
    return TINY if size in TINY_SIZES else PAPER


def get_config(size: str) -> SFTRecipe:
    return SFTRecipe(setup=setup(size), sft=stage(size))
