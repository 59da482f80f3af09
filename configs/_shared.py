"""What the recipes share, by size: where things run, shapes, and how critiques are sampled.

`tiny` is the embedded world on two CPU cores. The others expect a pretrained Gemma-2
(`--base DIR`) and preferences of yours (`--preferences FILE`).
"""

from grm_jax.recipes import (
    EngineConfig,
    JudgeDefaults,
    MeshConfig,
    SamplingConfig,
    Setup,
    TemplateConfig,
)

TINY = Setup(
    run_dir="runs/tiny",
    size="tiny",
    templates=TemplateConfig(many="compact", single="compact_single", meta="compact_meta"),
    # The paper votes at temperature 0.5; the embedded policy is sharp enough at 1.
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
    engine=EngineConfig(),
    length_buckets=(1024, 2048, 4096, 8192),
    remat="block",
    checkpoint_every=50,
)


def setup(size: str) -> Setup:
    """The shared part of a recipe. KeyError for a size that does not exist."""
    import dataclasses

    tensor = {"2b": 1, "9b": 4, "27b": 8}
    if size == "tiny":
        return TINY
    mesh = MeshConfig(fsdp=-1, tensor=tensor[size])
    return dataclasses.replace(PRETRAINED, size=size, run_dir=f"runs/{size}", mesh=mesh)


def sampling(size: str) -> SamplingConfig:
    """Critiques for training: temperature 1 and no filters, so log-probabilities are exact."""
    return SamplingConfig(temperature=1.0, max_new_tokens=64 if size == "tiny" else 1024)
