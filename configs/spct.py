"""The whole road: SFT, RFT, RL, meta RM, the scalar baseline, evaluation."""

import meta_rm
import rft
import rl
import scalar_rm
import sft
from _shared import setup

from grm_jax.recipes import SPCTRecipe


def get_config(size: str) -> SPCTRecipe:
    return SPCTRecipe(
        setup=setup(size),
        sft=sft.stage(size),
        rft=rft.stage(size),
        rl=rl.stage(size),
        meta_rm=meta_rm.stage(size),
        scalar_rm=scalar_rm.stage(size),
    )
