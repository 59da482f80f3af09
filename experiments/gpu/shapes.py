"""The shapes of dry runs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sampler"))

from device import Setting

from grm_jax.model.config import SIZES

# All that a Gemma-2 of 2b has, with heads of 256, too, but so small that a CPU computes it at once.
DRY_MODEL = SIZES["2b"].replace(
    num_layers=2,
    embed_dim=64,
    num_heads=2,
    num_kv_heads=1,
    hidden_dim=96,
    vocab_size=512,
    sliding_window=24,
    max_position=256,
)

DRY_SETTINGS = (Setting(32, 2, 1), Setting(64, 4, 2))
