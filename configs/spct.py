r"""All of SPCT (arXiv:2504.02495): SFT, RFT, RL, meta RM, the scalar baseline, and an evaluation.

Each stage is that of its own recipe, which says where its values come from: sft.py, rft.py, rl.py,
meta_rm.py and scalar_rm.py. Finished stages are not run again.

    python -m grm_jax.train --config spct.py
    python -m grm_jax.train --config spct.py:27b --base google/gemma-2-27b \
        --tokenizer google/gemma-2-27b-it --instructions instructions.jsonl \
        --preferences preferences.jsonl

The first ends with the table of the README. The second ends with the command that evaluates its
models on benchmarks.

What it reached: the tiny judge is right on 74.1% (71.7 to 75.3) of 1,000 held-out records when
greedy, on 86.5% (84.7 to 87.8) with 32 votes, and on 86.5% (85.0 to 87.4) with votes guided by the
meta RM. Each accuracy is the mean of three seeds with the lowest and the highest, made at commit
c8c3b08. A seed took 16 to 19 minutes on one core (at commit 7bc00a2). Both were made by

    python experiments/spct/seeds.py --seeds 0 1 2 --jobs 2

The 27b recipe has not been run. The paper's judge has 69.9 overall when greedy, 71.0 with 32 votes
and 72.8 with guided ones (Table 2).
"""

import meta_rm
import rft
import rl
import scalar_rm
import sft
from _shared import setup

from grm_jax.recipes import Evaluation, SPCTRecipe

# On the embedded world only.
EVALUATION = Evaluation(
    k=32,  # the paper's largest vote: Table 2
    records=None,  # all
    # Each sample sees the responses in another order (section 4); here every response stands in
    # every place about as often as in any other.
    order="balanced",
)


def get_config(size: str) -> SPCTRecipe:
    return SPCTRecipe(
        setup=setup(size),
        sft=sft.stage(size),
        rft=rft.stage(size),
        rl=rl.stage(size),
        meta_rm=meta_rm.stage(size),
        scalar_rm=scalar_rm.stage(size),
        evaluation=EVALUATION,
    )
