"""The options of each stage and of its optimizer; those that all stages share are in setup.py.

No JAX: `--help` and wrong options are answered at once.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from grm_jax.identity import how
from grm_jax.judge.prompts import OrderMode
from grm_jax.sampler.options import SamplingConfig


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients update the parameters."""

    name: Literal["adamw", "muon", "adafactor"] = "adamw"
    """muon orthogonalises updates of matrices; embeddings, norms and the scalar head get Adam."""
    learning_rate: float = 1e-4
    """Peak learning rate (of the matrices, for muon)."""
    adam_scale: float = 0.3
    """muon: the learning rate of Adam's part as a fraction of `learning_rate`."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after the warm-up; cosine and linear decay to `final_fraction` at the last step."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    final_fraction: float = 0.05
    """Learning rate at the end over the peak, for decaying schedules."""
    b1: float = 0.9
    b2: float = 0.98
    weight_decay: float = 0.0
    """Decoupled: a step takes learning rate times this off the decayed parameters (adafactor: this
    alone)."""
    decayed: Literal["all", "matrices"] = "all"
    """What decays: all parameters, or neither norms nor the embedding. muon decays its matrices
    alone, whatever this says."""
    clip_norm: float = 1.0
    """Global gradient norm is clipped to this; 0 turns clipping off."""


@dataclasses.dataclass(frozen=True)
class Fitting:
    """Supervised training on fixed examples, whatever the loss."""

    steps: int = 900
    batch_size: int = 1024
    """The rows of a step (pairs, for the Bradley-Terry baseline)."""
    pack: int = 0
    """The tokens of a row into which several examples are packed; 0: one example a row. Pairs can
    not be packed."""
    device_batch: int = how(0)
    """The most rows (or pairs) that a device computes at once; a step with more is split into
    micro-batches. 0: all rows."""
    optimizer: OptimizerConfig = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class ColdStart:
    """Critiques that the base model writes for SFT where there is no teacher: `cold_start`."""

    many: str | None = None
    """A template that shows worked examples of several responses, such as `short_examples`; None:
    no cold start, SFT needs --instructions."""
    single: str = "short_single_examples"
    """The same for single responses."""
    records: int | None = None
    """How many records are sampled; None: all."""
    samples: int = 2
    """How many critiques are sampled for each record, each with a hint."""
    sampling: SamplingConfig = SamplingConfig()
    chunk: int = how(128)
    """How many records are sampled between two writes to disk."""


@dataclasses.dataclass(frozen=True)
class SFT:
    """Supervised training; loss on the completion only."""

    fitting: Fitting = Fitting(optimizer=OptimizerConfig(learning_rate=5e-6))
    cold_start: ColdStart = ColdStart()


@dataclasses.dataclass(frozen=True)
class RFT:
    """Rejective fine-tuning (section 3.2): sample, reject, train on what is kept."""

    records: int | None = None
    """How many records are sampled; None: all."""
    samples: int = 3
    """N_RFT: how many trajectories without a hint are sampled for each record."""
    orders: int = 1
    """In how many orders of a record's responses they are sampled, in turn. A multiple of the
    number of responses shows each one in each place equally often; 1: as in the paper."""
    hinted: bool = True
    """Sample one more trajectory for each record, with a prompt that reveals the best response."""
    sampling: SamplingConfig = SamplingConfig()
    chunk: int = how(512)
    """How many records are sampled between two writes to disk."""
    relabel: bool = False
    """Learn wrong critiques, too, with scores that are right: those of two responses exchanged,
    that of a single one mirrored. No record is too easy then. For judges whose text says little of
    the verdict yet; not in the paper."""
    text_weight: float = 1.0
    """The weight of the tokens before a critique's verdict in the loss; those of its scores, and
    what follows, have 1. The paper: 1."""
    fitting: Fitting = Fitting(optimizer=OptimizerConfig(learning_rate=5e-6))


@dataclasses.dataclass(frozen=True)
class RL:
    """Rule-based online RL: GRPO with a KL penalty (section 3.2, Eq. 11 and 15)."""

    steps: int = 900
    prompts: int = 128
    """Prompts a step; times `group` gives the rollouts (512 are the paper's batch, if that counts
    rollouts)."""
    orders: int = 1
    """The prompts that a step makes of a record, in as many orders of its responses. A multiple of
    the number of responses shows each one in each place equally often; 1: as in the paper."""
    group: int = 4
    """G: rollouts a prompt."""
    kl_coef: float = 0.08
    """beta, the weight of the KL divergence to the frozen reference (0.08: the paper's for 27B); 0:
    no reference is loaded, and the metric `kl` is 0."""
    clip_low: float = 0.2
    """How far the ratio of the policies may fall below 1 before it is clipped (not given in the
    paper)."""
    clip_high: float = 0.2
    """How far the ratio of the policies may rise above 1 before it is clipped (not given in the
    paper). Above `clip_low` this is DAPO's clip-higher. With one update a rollout it acts only
    where sampler and trainer disagree."""
    tie: Literal["paper", "expected"] = "paper"
    """The reward of a critique whose top score is shared. paper: -1, as for a wrong critique;
    expected: the mean reward if one of the tied responses were picked at random."""
    rare: float = 0.0
    """A right rollout earns up to this share less, the more probable it is among those of its group
    (the unlikeliness reward of arXiv:2506.02355); 0: all right ones earn the same (the paper)."""
    vote: float = 0.0
    """Added to the reward: this times how much more often votes of half of the group are right with
    the rollout than without it; 0: single critiques alone are rewarded (the paper)."""
    placeless: bool = False
    """Take out of a step's advantages what would strengthen a leaning to the response shown first,
    or to another place. It compares the prompts of a step: with `orders` of 2 or more all places
    are right equally often in it, with 1 nearly so, if `prompts` are many."""
    text_weight: float = 1.0
    """The tokens before a critique's verdict learn from this share of its advantage, those of its
    scores from all of it; 1: all tokens alike (the paper). Where the text says little of the
    verdict yet, its tokens add mostly noise to what the scores learn."""
    aggregation: Literal["sequence", "token"] = "sequence"
    """sequence: the mean over the tokens of a rollout, then over rollouts (the paper); token: the
    mean over all tokens of the batch."""
    train_groups: int | None = None
    """Update on at most this many groups a step, and only on those with signal: groups without it
    are dropped, and no other ones are sampled in their place. None: on all groups; those without
    signal still contribute to the KL term, as in the paper."""
    device_batch: int = how(1)
    """The most groups that a device computes at once; a step with more is split into micro-batches.
    0: all groups. Micro-batches whose groups were all dropped are skipped, and those that hold only
    short rollouts are cut to half of the length."""
    offload_reference: bool = how(False)
    """Keep the reference policy in host memory while it is not needed."""
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=1024)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=4e-7)
    save_rollouts: bool = how(True)
    """Write every rollout's text and reward to rollouts.jsonl (the meta RM can learn from them)."""


@dataclasses.dataclass(frozen=True)
class MetaRM:
    """The scalar head that judges critiques (BCE; section 4)."""

    start: Literal["base", "sft", "rft", "rl", "scalar_rm"] = "base"
    """Weights it starts from; the paper: the base model. scalar_rm: with its scalar head."""
    tie: Literal["paper", "expected", "leave-out"] = "paper"
    """The label of a critique whose top score is shared. paper: 0, as of a wrong critique;
    expected: how often it is right if one of the tied responses is picked at random; leave-out: the
    meta RM does not learn from such critiques."""
    rft_trajectories: bool = True
    """Learn from all non-hinted RFT trajectories, right and wrong."""
    records: int | None = None
    """For how many records the trained GRM is sampled; None: for all."""
    samples: int = 3
    """How many trajectories the trained GRM writes for each record."""
    rollouts: bool = False
    """Also learn from the rollouts of the RL stage, whose labels are known."""
    holdout: float = 0.05
    """The share of records whose critiques are held out, for accuracy and ROC-AUC."""
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
    """The evaluation at the end of the pipeline on the embedded world."""

    k: int = 32
    """How many critiques are sampled for each record."""
    records: int | None = None
    """Held-out records of the training distribution; None: all."""
    order: OrderMode = "balanced"
    """How the k samples see the responses."""


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The options of all stages and of the evaluation at the end."""

    sft: SFT = SFT()
    rft: RFT = RFT()
    rl: RL = RL()
    meta_rm: MetaRM = MetaRM()
    scalar_rm: ScalarRM = ScalarRM()
    evaluation: Evaluation = Evaluation()
