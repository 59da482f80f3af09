"""What the recipes share, by size: where things run, shapes, templates, and how the judge is used.

`tiny`, `tiny_half` and `tiny_double` are the embedded world on two CPU cores. The others expect a
pretrained model (`--base MODEL`) and preferences of yours (`--preferences FILE`). The recipes of
gemma3_270m and smollm2_135m have not been run to their end, and their values are first choices, not
tuned. "Not given in the paper" is what arXiv:2504.02495 leaves open.
"""

import dataclasses

from grm_jax.model.config import TINY_SIZES
from grm_jax.recipes import EngineConfig, JudgeDefaults, MeshConfig, Setup, TemplateConfig

TINY = Setup(
    templates=TemplateConfig(many="compact", single="compact_single", meta="compact_meta"),
    # The paper votes at temperature 0.5, at which the votes of SFT and RFT are better here.
    # Those of RL are not (experiments/claims/temperature.md).
    judge=JudgeDefaults(temperature=1.0, max_new_tokens=64),
    mesh=MeshConfig(replica=-1, fsdp=1, cpu_devices=2),
    engine=EngineConfig(
        max_rows=1024, page=48, prefill_tokens=65_536, chunk=40, min_lanes=1024, spare=0.25
    ),
    length_buckets=(32, 72, 112),
    prompt_buckets=(32, 48),
    remat="none",
    logprob_chunk=1 << 20,
    checkpoint_every=25,
)

PRETRAINED = Setup(
    preferences="data/preferences.jsonl",
    templates=TemplateConfig(many="grm", single="single", meta="meta"),  # appendix G
    judge=JudgeDefaults(
        temperature=0.5,  # Tables 3 and 6
        max_new_tokens=1024,  # not given in the paper
    ),
    engine=EngineConfig(),
    # Longest prompts and responses are not given in the paper.
    length_buckets=(1024, 2048, 4096, 8192),
    prompt_buckets=(512, 1024, 2048, 4096, 7168),
    remat="block",
    checkpoint_every=50,
)

# Short critiques of short prompts: two CPU cores compute a few hundred tokens a second.
SMALL = Setup(
    preferences="data/preferences.jsonl",
    long_prompts="truncate-middle",
    templates=TemplateConfig(many="short", single="short_single", meta="meta"),
    judge=JudgeDefaults(temperature=1.0, max_new_tokens=80),
    mesh=MeshConfig(fsdp=-1),
    engine=EngineConfig(max_rows=128, page=128, prefill_tokens=2048, chunk=32, min_lanes=16),
    length_buckets=(256, 320, 384, 448, 512, 640, 768, 1024, 1280),
    prompt_buckets=(192, 256, 320, 384, 512, 768, 1024),
    remat="none",
    logprob_chunk=512,
    checkpoint_every=10,
    log_every=5,
)
SMALL_SIZES = ("gemma3_270m", "smollm2_135m")


# Over how many devices heads and vocabulary are split; it divides a model's key/value heads.
TENSOR = {"2b": 1, "9b": 4, "27b": 8}
TENSOR |= {"gemma3_270m": 1, "gemma3_1b": 1, "gemma3_4b": 1, "gemma3_12b": 4, "gemma3_27b": 8}
TENSOR |= {"llama3_1b": 1, "llama3_3b": 1, "llama3_8b": 4, "llama3_70b": 8}
TENSOR |= {"smollm2_135m": 1, "smollm2_360m": 1, "smollm2_1_7b": 1}
TENSOR |= {"qwen2_5_0_5b": 1, "qwen2_5_1_5b": 1, "qwen2_5_3b": 1, "qwen2_5_7b": 4}
TENSOR |= {"qwen2_5_14b": 4, "qwen2_5_32b": 8, "qwen2_5_72b": 8}
TENSOR |= {"qwen3_0_6b": 1, "qwen3_1_7b": 1, "qwen3_4b": 1, "qwen3_8b": 4}
TENSOR |= {"qwen3_14b": 4, "qwen3_32b": 8}


def setup(size: str) -> Setup:
    """The shared part of a recipe. KeyError for a size that does not exist."""
    if size in TINY_SIZES:
        return dataclasses.replace(TINY, size=size, run_dir=f"runs/{size}")
    if size in SMALL_SIZES:
        return dataclasses.replace(SMALL, size=size, run_dir=f"runs/{size}")
    mesh = MeshConfig(fsdp=-1, tensor=TENSOR[size])
    return dataclasses.replace(PRETRAINED, size=size, run_dir=f"runs/{size}", mesh=mesh)
