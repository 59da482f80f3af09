"""The embedded world as files, in the formats of users' own data.

cold_start.jsonl   trajectories of the teacher, for supervised training
train.jsonl        preferences, for RFT, RL and the scalar baseline
heldout.jsonl      preferences for evaluation: domain fresh | operands | combinations, and task and
                   defect where the world leaves a task or a kind of defect out of training
tokenizer/         a word-level tokenizer as an ordinary tokenizer.json directory
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from grm_jax.data.preferences import Preference, write_preferences
from grm_jax.data.synthetic import (
    CRITERIA,
    TASKS,
    Item,
    Split,
    Teacher,
    WorldConfig,
    make_item,
    vocabulary,
)
from grm_jax.data.trajectories import Trajectory, write_trajectories
from grm_jax.files import written_whole
from grm_jax.tokenizer import ChatTokenizer, from_tokenizers

SIZES_OF_N = ((1, 2, 3, 4), (0.12, 0.48, 0.24, 0.16))
CONTROL = ["<pad>", "<bos>", "<eos>", "<judge>", "<unk>"]


def build_tokenizer() -> ChatTokenizer:
    """The word-level tokenizer, whose pieces are words with a leading space, and markers."""
    pieces = vocabulary()
    ids = {piece: index for index, piece in enumerate([*CONTROL, *pieces])}
    backend = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in CONTROL])
    # Longest first, so that "10" is not read as "1" and "0"; unknown words stay whole.
    longest_first = map(_escape, sorted(pieces, key=len, reverse=True))
    # ", " stands between scores: a response that ends in a comma must not take the space of the
    # marker or word behind it (" [B]", " best").
    known = (r", (?=[0-9]|\z)" if piece == ", " else piece for piece in longest_first)
    pattern = "|".join([*known, r" ?[^\s,}]+", r"\s", r"[,}]"])
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    backend.decoder = decoders.Fuse()
    config = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "chat_template": (
            "{{ bos_token }}{% for m in messages %}{{ m.content }}"
            "{% if m.role == 'assistant' %}{{ eos_token }}{% else %}<judge>{% endif %}{% endfor %}"
        ),
    }
    return from_tokenizers(backend, config, name="embedded")


def _escape(piece: str) -> str:
    return "".join(f"\\{c}" if c in "\\[](){}.*+?^$|" else c for c in piece)


def write_world(directory: str | Path, config: WorldConfig) -> None:
    """Write the files. Deterministic in `config`; existing files are replaced."""
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    teacher = Teacher()
    tasks = [task for task in TASKS if task != config.unseen_task]
    defects = [criterion for criterion in CRITERIA if criterion != config.unseen_defect]

    def usual(rng: random.Random, split: Split) -> Iterator[Item]:
        return _items(rng, split, tasks, defects)

    rng = random.Random(f"{config.seed} cold start")
    # Items and critiques are drawn in turn from one random stream.
    cold = [
        (item, teacher.write(rng, item))
        for item in itertools.islice(usual(rng, Split.TRAIN), config.cold_start)
    ]
    write_trajectories(
        root / "cold_start.jsonl",
        [_trajectory(f"cold-{i}", item, text) for i, (item, text) in enumerate(cold)],
    )
    rng = random.Random(f"{config.seed} train")
    train = list(itertools.islice(usual(rng, Split.TRAIN), config.train))
    write_preferences(root / "train.jsonl", preferences("train", train))
    seen = {_content(item) for item in (*train, *(item for item, _ in cold))}
    heldout = []
    for domain, split, count in (
        ("fresh", Split.TRAIN, config.fresh),
        ("operands", Split.OPERANDS, config.shifted),
        ("combinations", Split.COMBINATIONS, config.shifted),
    ):
        rng = random.Random(f"{config.seed} {domain}")
        items = (item for item in usual(rng, split) if _content(item) not in seen)
        heldout += preferences(domain, list(itertools.islice(items, count)))
    if config.unseen_task is not None:
        rng = random.Random(f"{config.seed} task")
        items = _items(rng, Split.TRAIN, [config.unseen_task], defects)
        heldout += preferences("task", list(itertools.islice(items, config.shifted)))
    if config.unseen_defect is not None:
        rng = random.Random(f"{config.seed} defect")
        items = (
            item for item in _items(rng, Split.TRAIN, tasks, CRITERIA)
            if any(not c[config.unseen_defect].ok for c in item.checks if config.unseen_defect in c)
        )  # fmt: skip
        heldout += preferences("defect", list(itertools.islice(items, config.shifted)))
    write_preferences(root / "heldout.jsonl", heldout)
    build_tokenizer().save(root / "tokenizer")
    about = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    with written_whole(root / "world.json") as partial:  # last: the world is whole
        partial.write_text(about, encoding="utf-8")


def _content(item: Item) -> tuple[str, ...]:
    """A key that is equal for the same query and responses in any order."""
    return (item.query, *sorted(item.response_texts))


def _items(
    rng: random.Random, split: Split, tasks: Sequence[str], defects: Collection[str]
) -> Iterator[Item]:
    """Endless items, with the usual numbers of responses."""
    while True:
        n = rng.choices(*SIZES_OF_N)[0]
        yield make_item(rng, n, split, tasks=tasks, defects=defects)


def preferences(domain: str, items: Sequence[Item]) -> list[Preference]:
    """The records of items; their ids are the domain and a number."""
    return [
        Preference(
            id=f"{domain}-{i}",
            turns=({"role": "user", "content": item.query},),
            responses=tuple(item.response_texts),
            labels=tuple(item.labels),
            domain=domain,
        )
        for i, item in enumerate(items)
    ]


def _trajectory(name: str, item: Item, critique: str) -> Trajectory:
    return Trajectory(
        example_id=name,
        sample=0,
        order=tuple(range(len(item.response_texts))),
        scores=None,
        failure=None,
        finish_reason="stop",
        text=critique,
        query=item.query,
        responses=tuple(item.response_texts),
        labels=tuple(item.labels),
    )
