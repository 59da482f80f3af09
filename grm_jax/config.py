"""Recipes: frozen dataclasses, loaded from a small Python file and overridden on the command line.

A recipe file defines `get_config(size: str) -> Recipe` for one of the recipe classes below:

    --config rl.py          get_config("tiny"), the embedded default that a CPU runs
    --config rl.py:27b      get_config("27b"), the paper's

The file is looked for as given and then in `configs/`. What was used is written to the run
directory. A run is only resumed with a recipe that says the same; fields declared with `how` may
change.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from grm_jax.data.long_prompts import LongPrompts
from grm_jax.data.rows import MAX_BAD_SHARE
from grm_jax.data.synthetic_files import WorldConfig
from grm_jax.errors import UserError
from grm_jax.files import expanded
from grm_jax.identity import how
from grm_jax.model.gemma2 import Remat
from grm_jax.model.lora import LoRAConfig
from grm_jax.parallel.options import MeshConfig
from grm_jax.sampler.critic import OrderMode, TemplateConfig
from grm_jax.sampler.draw import SamplingConfig
from grm_jax.sampler.plan import EngineConfig
from grm_jax.training.optimizer import OptimizerConfig

# Beside the package in a clone, in the package where it was installed without one.
_PLACES = (Path(__file__).resolve().parent.parent / "configs", Path(__file__).parent / "configs")
CONFIG_DIR = next((place for place in _PLACES if (place / "spct.py").is_file()), _PLACES[0])
SYNTHETIC = "synthetic"


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What happens to steps that would do harm."""

    spike: float = 30.0
    """A gradient norm of so many times its running mean is not taken; 0 takes all finite ones."""
    patience: int = 10
    """So many steps in a row that were not taken lead back to the last checkpoint."""
    rollbacks: int = 3
    """So many times; then the run ends with an error."""


@dataclasses.dataclass(frozen=True)
class KeepConfig:
    """Which checkpoints of a running stage are kept."""

    latest: int = 2
    """The newest so many."""
    every: int = 0
    """And those of steps that are multiples of this; 0: none."""


@dataclasses.dataclass(frozen=True)
class JudgeDefaults:
    """How the trained judge is sampled where nobody says otherwise; stored beside its weights."""

    temperature: float = 0.5
    """Of the samples of a vote (the paper's)."""
    max_new_tokens: int = 1024
    """Length limit of a critique."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the stages of a run share."""

    run_dir: str = how("runs/spct")
    """Everything a run writes. The same command takes an interrupted run up again."""
    seed: int = 0
    size: str = "tiny"
    """Model size when there is no `base`: tiny, 2b, 9b or 27b."""
    base: str | None = None
    """Pretrained checkpoint the road starts from: a Hugging Face folder, a repo id of the hub, or a
    converted one. None: random weights (only sensible for the embedded world)."""
    tokenizer: str | None = None
    """Tokenizer folder or sentencepiece model; None: the base checkpoint's, or the embedded one."""
    preferences: str = SYNTHETIC
    """Preference file(s) for RFT, RL and the reward heads; `synthetic` is the embedded world."""
    instructions: str | None = None
    """Trajectories or instruction data for supervised training; None with the embedded world: the
    teacher's."""
    skip_bad_rows: bool = False
    """Count and list bad rows of the data files instead of stopping at the first; preferences
    without a single best response are left out, too."""
    max_bad_share: float = how(MAX_BAD_SHARE)
    """With --skip-bad-rows: stop all the same where more than this share of the rows is bad."""
    long_prompts: LongPrompts = "error"
    """What happens to records that are longer than a stage takes: an error before anything starts;
    skip leaves them out; truncate-middle takes the middle out of their longest texts. Both are
    counted in the log."""
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
    """Tokens whose logits over the vocabulary are held at once."""
    remat: Remat = how("block")
    """What the backward pass computes again: no matrix product, only what lies between them (none);
    every pair of layers (block); all but their attention (block_save_attention); or all, from
    inputs kept in host memory (offload)."""
    attention: Literal["auto", "reference", "chunked", "splash", "tokamax"] = how("auto")
    """How attention is computed; auto: splash on TPUs, tokamax on Hopper and Blackwell GPUs where
    it is installed, else chunked."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """What trained parameters are stored in. bfloat16 halves their memory: moments stay float32,
    updates are rounded stochastically."""
    lora: LoRAConfig = LoRAConfig()
    guard: GuardConfig = how(GuardConfig())
    keep: KeepConfig = how(KeepConfig())
    log_every: int = how(10)
    """Steps between two rows of metrics (RL writes every step)."""
    checkpoint_every: int = how(100)
    """Steps between two checkpoints."""
    profile: str | None = how(None)
    """FIRST:LAST writes a trace of these steps into the stage's directory."""
    distributed: Literal["auto", "on", "off"] = how("auto")
    """Join the other processes of a cluster: when one is found, always, or never."""


@dataclasses.dataclass(frozen=True)
class Fitting:
    """Supervised training on fixed examples, whatever the loss."""

    steps: int = 900
    batch_size: int = 1024
    """Rows of a step (pairs, for the Bradley-Terry baseline)."""
    pack: int = 0
    """Tokens of a row that holds as many examples as fit; 0: an example a row. Not for pairs."""
    device_batch: int = how(0)
    """Rows (or pairs) that a device computes at a time, its others after them; 0: all."""
    optimizer: OptimizerConfig = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class SFT:
    """Supervised training; loss on the completion only."""

    fitting: Fitting = Fitting(optimizer=OptimizerConfig(learning_rate=5e-6))


@dataclasses.dataclass(frozen=True)
class RFT:
    """Rejective fine-tuning (section 3.2): sample, reject, train on what is kept."""

    records: int | None = None
    """Preferences sampled; None: all."""
    samples: int = 3
    """N_RFT: non-hinted trajectories a record."""
    hinted: bool = True
    """Sample one more trajectory with the best response given away."""
    sampling: SamplingConfig = SamplingConfig()
    chunk: int = how(512)
    """Records sampled between two writes to disk."""
    fitting: Fitting = Fitting(optimizer=OptimizerConfig(learning_rate=5e-6))


@dataclasses.dataclass(frozen=True)
class RL:
    """Rule-based online RL: GRPO with a KL penalty (section 3.2, Eq. 11 and 15)."""

    steps: int = 900
    prompts: int = 128
    """Records a step; times `group` gives the rollouts (the paper's 512, if it counts rollouts)."""
    group: int = 4
    """G: rollouts a prompt."""
    kl_coef: float = 0.08
    """beta, the weight of the KL to the frozen reference."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    """epsilon below and above 1 (not given in the paper)."""
    tie: Literal["paper", "expected"] = "paper"
    """Reward of a tie for the top score: wrong, or its expectation under the shuffle."""
    aggregation: Literal["sequence", "token"] = "sequence"
    """Mean over tokens within a rollout first (the paper), or over all tokens of the batch."""
    train_groups: int | None = None
    """Update on at most so many groups a step, and only on those with signal (dynamic sampling);
    None: on all groups, of which those without signal still feel the KL term, as in the paper."""
    device_batch: int = how(1)
    """Groups that a device computes at a time, its others after them; 0: all. Parts without any
    rollout are skipped, and those whose rollouts are all short cut to half of the length."""
    offload_reference: bool = how(False)
    """Keep the reference policy in host memory while it is not needed."""
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=1024)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=4e-7)
    save_rollouts: bool = how(True)
    """Write every rollout's text and reward to rollouts.jsonl (the meta RM can learn from them)."""


@dataclasses.dataclass(frozen=True)
class MetaRM:
    """The scalar head that judges critiques (BCE; section 4)."""

    start: Literal["base", "sft", "rft", "rl"] = "base"
    """Weights it starts from; the paper: the base model."""
    rft_trajectories: bool = True
    """Learn from all non-hinted RFT trajectories, right and wrong."""
    records: int | None = None
    """Preferences on which the trained GRM is sampled for it; None: all."""
    samples: int = 3
    """Trajectories of the trained GRM a record."""
    rollouts: bool = False
    """Also learn from the rollouts of the RL stage (their labels are free)."""
    holdout: float = 0.05
    """Share of records kept for accuracy and ROC-AUC."""
    sampling: SamplingConfig = SamplingConfig()
    fitting: Fitting = Fitting(batch_size=512, optimizer=OptimizerConfig(learning_rate=1e-5))


@dataclasses.dataclass(frozen=True)
class ScalarRM:
    """The Bradley-Terry baseline on the same backbone and preferences."""

    start: Literal["base", "sft", "rft"] = "base"
    """Weights it starts from."""
    fitting: Fitting = Fitting(batch_size=256, optimizer=OptimizerConfig(learning_rate=1e-5))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What the whole road on the embedded world is judged by at its end."""

    k: int = 32
    """Samples a record."""
    records: int | None = None
    """Held-out records of the training distribution; None: all."""
    order: OrderMode = "balanced"
    """How the k samples see the responses."""


SharedSetup = Annotated[Setup, tyro.conf.arg(name="")]
Init = Annotated[str | None, tyro.conf.arg(metavar="PATH")]


@dataclasses.dataclass(frozen=True)
class SFTRecipe:
    setup: SharedSetup = Setup()
    sft: SFT = SFT()


@dataclasses.dataclass(frozen=True)
class RFTRecipe:
    setup: SharedSetup = Setup()
    rft: RFT = RFT()
    init: Init = None
    """Checkpoint to start from instead of this run's supervised stage."""


@dataclasses.dataclass(frozen=True)
class RLRecipe:
    setup: SharedSetup = Setup()
    rl: RL = RL()
    init: Init = None
    """Checkpoint to start from (and to stay near) instead of this run's RFT stage."""


@dataclasses.dataclass(frozen=True)
class MetaRMRecipe:
    setup: SharedSetup = Setup()
    meta_rm: MetaRM = MetaRM()
    init: Init = None
    """Checkpoint of the GRM to be guided instead of this run's RL stage."""


@dataclasses.dataclass(frozen=True)
class ScalarRMRecipe:
    setup: SharedSetup = Setup()
    scalar_rm: ScalarRM = ScalarRM()
    init: Init = None
    """Checkpoint to start from instead of `scalar_rm.start`."""


@dataclasses.dataclass(frozen=True)
class SPCTRecipe:
    """The whole road."""

    setup: SharedSetup = Setup()
    sft: SFT = SFT()
    rft: RFT = RFT()
    rl: RL = RL()
    meta_rm: MetaRM = MetaRM()
    scalar_rm: ScalarRM = ScalarRM()
    evaluation: Evaluation = Evaluation()


Recipe = SFTRecipe | RFTRecipe | RLRecipe | MetaRMRecipe | ScalarRMRecipe | SPCTRecipe


class ConfigError(UserError):
    """A recipe that can not be used; the message says why and what to do."""


def load(spec: str) -> Recipe:
    """The recipe that `--config` names: `file.py` or `file.py:size`.

    Raises ConfigError when the file is not found, defines no `get_config`, or rejects the size.
    """
    name, _, size = spec.partition(":")
    candidates = [expanded(name), CONFIG_DIR / name]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise ConfigError(f"{name}: no such recipe, here or in {CONFIG_DIR}; there are {names()}")
    module_spec = importlib.util.spec_from_file_location(f"grm_jax_recipe_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    # As for a script: a recipe may import what lies beside it (configs/_shared.py).
    sys.path.insert(0, str(path.resolve().parent))
    try:
        module_spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise ConfigError(f"{path}: defines no get_config(size); see configs/rl.py")
    size = size or "tiny"
    try:
        return get_config(size)
    except KeyError as error:
        if error.args != (size,):  # a fault of the recipe's own
            raise
        raise ConfigError(f"{path}: has no size {error}; try tiny, 2b, 9b or 27b") from error


def names() -> str:
    """The recipes that come with the package."""
    return ", ".join(sorted(path.name for path in CONFIG_DIR.glob("[!_]*.py")))


def to_json(value: Any) -> str:
    """A dataclass (or a dict that holds some) as indented JSON."""

    def plain(node: Any) -> Any:
        if dataclasses.is_dataclass(node) and not isinstance(node, type):
            return dataclasses.asdict(node)
        raise TypeError(f"{node!r} can not be written as JSON")

    return json.dumps(value, default=plain, indent=2, sort_keys=True) + "\n"
