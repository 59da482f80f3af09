"""The options that the stages of a run share, and those of training on fixed examples."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

from grm_jax.critique.template_set import TemplateConfig
from grm_jax.data.long_prompts import LongPrompts
from grm_jax.data.rows import MAX_BAD_SHARE
from grm_jax.data.synthetic import WorldConfig
from grm_jax.errors import UserError
from grm_jax.identity import how
from grm_jax.judge.request import JudgeDefaults
from grm_jax.model.options import ComputeDtype, LoRAConfig, Remat
from grm_jax.parallel.options import MeshConfig
from grm_jax.sampler.options import EngineConfig

SYNTHETIC = "synthetic"


class ConfigError(UserError):
    """A recipe that can not be used; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Which steps are skipped, and when training goes back to a checkpoint."""

    spike: float = 30.0
    """Skip a step whose gradient norm exceeds this multiple of its running mean; 0: never, as long
    as loss and gradient are finite."""
    patience: int = 10
    """Consecutive skipped steps after which training goes back to the last checkpoint."""
    rollbacks: int = 3
    """How often training goes back to a checkpoint before the run ends with an error."""


@dataclasses.dataclass(frozen=True)
class KeepConfig:
    """Which checkpoints of a running stage are kept."""

    latest: int = 2
    """How many of the newest checkpoints are kept."""
    every: int = 0
    """Checkpoints of steps that are multiples of this are kept, too; 0: none."""


@dataclasses.dataclass(frozen=True)
class HeldOutConfig:
    """What a stage is measured on while it trains."""

    every: int = how(0)
    """Steps between two measurements on held-out records, with one more after the last step; 0:
    none. The meta RM is measured on the critiques that --meta-rm.holdout keeps, all other stages on
    the records below."""
    records: str | None = how(None)
    """Preference file(s) of held-out records. A record that is learnt from, too, is an error."""
    share: float = 0.0
    """Instead of a file: the share of the conversations in `preferences` that no stage learns from.
    The same in every stage of a run."""
    limit: int = how(256)
    """The most records of a measurement, from the first one on."""
    sampled: bool = how(False)
    """Sample the critique of a record at the judge's temperature; otherwise it is the greedy one.
    """


@dataclasses.dataclass(frozen=True)
class Setup:
    """The options that the stages of a run share."""

    run_dir: str = how("runs/spct")
    """The directory of everything that a run writes. The same command resumes an interrupted run.
    """
    seed: int = 0
    size: str = "tiny"
    """The model's size where there is no `base`: tiny, 2b, 9b or 27b."""
    base: str | None = None
    """The pretrained checkpoint that training starts from: a Hugging Face folder, a repo id of the
    hub, or a converted folder. None: random weights, which only suit the embedded world."""
    tokenizer: str | None = None
    """A tokenizer's folder or a sentencepiece model; None: the base checkpoint's tokenizer, or that
    of the embedded world."""
    preferences: str = SYNTHETIC
    """Preference file(s) for RFT, RL and the reward heads; `synthetic` is the embedded world."""
    instructions: str | None = None
    """Trajectories or instruction data for supervised training; None with the embedded world: the
    teacher's."""
    skip_bad_rows: bool = False
    """Count and list bad rows of the data files instead of stopping at the first; preferences
    without a single best response are left out, too."""
    max_bad_share: float = how(MAX_BAD_SHARE)
    """With --skip-bad-rows: stop nevertheless where more than this share of the rows is bad."""
    long_prompts: LongPrompts = "error"
    """What happens to records that are longer than a stage takes. error: stop before anything
    starts; skip: leave them out; truncate-middle: cut the middle out of their longest texts. The
    log says how many were skipped or truncated."""
    world: WorldConfig = WorldConfig()
    templates: TemplateConfig = TemplateConfig()
    judge: JudgeDefaults = how(JudgeDefaults())
    mesh: MeshConfig = how(MeshConfig())
    engine: EngineConfig = EngineConfig()
    length_buckets: tuple[int, ...] = how((1024, 2048, 4096, 8192))
    """Training rows (prompt and critique) are padded to the next of these lengths."""
    prompt_buckets: tuple[int, ...] = how((512, 1024, 2048, 4096, 7168))
    """RL: prompts are padded to the next of these lengths."""
    logprob_chunk: int = how(2048)
    """How many tokens' logits over the vocabulary a device holds at once."""
    remat: Remat = how("block")
    """What the backward pass computes again. none: only what lies between matrix products; block:
    every pair of layers; block_save_attention: the same without attention; offload: every pair of
    layers, from inputs that are kept in host memory."""
    attention: Literal["auto", "reference", "chunked", "splash", "tokamax"] = how("auto")
    """How attention is computed; auto: splash on TPUs, tokamax on Hopper and Blackwell GPUs where
    it is installed, else chunked."""
    compute_dtype: ComputeDtype = how("auto")
    """The dtype of activations and of the weights that they are multiplied with; auto: the base
    checkpoint's own (float32 for the embedded world), unless it is bfloat16 and this is a CPU that
    is not at least 1.5 times as fast in it."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype in which trained parameters are stored. bfloat16 halves their memory; moments stay
    float32, and updates are rounded stochastically."""
    lora: LoRAConfig = LoRAConfig()
    guard: GuardConfig = how(GuardConfig())
    keep: KeepConfig = how(KeepConfig())
    heldout: HeldOutConfig = HeldOutConfig()
    log_every: int = how(10)
    """Steps between two rows of metrics (RL writes every step)."""
    checkpoint_every: int = how(100)
    """Steps between two checkpoints."""
    profile: str | None = how(None)
    """FIRST:LAST writes a trace of these steps into the stage's directory."""
    distributed: Literal["auto", "on", "off"] = how("auto")
    """Join the other processes of a cluster: when one is found, always, or never."""


def to_json(value: Any) -> str:
    """A dataclass, or a dict with dataclasses in it, as indented JSON."""

    def plain(node: Any) -> Any:
        if dataclasses.is_dataclass(node) and not isinstance(node, type):
            return dataclasses.asdict(node)
        raise TypeError(f"{node!r} can not be written as JSON")

    return json.dumps(value, default=plain, indent=2, sort_keys=True) + "\n"
