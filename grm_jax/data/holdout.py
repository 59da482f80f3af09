"""Which records are held out of training, and whether others were learnt from after all.

Membership depends on the record alone, so that it stays the same when records are added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

from grm_jax.critique.prompt import Turn
from grm_jax.data.preferences import Preference
from grm_jax.data.trajectories import Trajectory

Prompt = tuple[str, tuple[str, ...]]


def in_share(name: str, share: float) -> bool:
    """Whether a name belongs to a pseudo-random share of all names. A larger share contains a
    smaller one."""
    digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") < share * 2**32


def split(records: Iterable[Preference], share: float) -> tuple[list[Preference], list[Preference]]:
    """(records to learn from, held-out records), both in the order given.

    Records with the same conversation stay together, so that no held-out conversation is learnt
    from with other responses.
    """
    learned: list[Preference] = []
    heldout: list[Preference] = []
    for record in records:
        # Another name than the id, by which the meta RM holds out critiques.
        name = f"conversation {_conversation(record.turns)}"
        (heldout if in_share(name, share) else learned).append(record)
    return learned, heldout


def overlap(
    heldout: Sequence[Preference], learned: Iterable[Preference | Trajectory]
) -> list[tuple[Preference, str]]:
    """The held-out records that are among those that are learnt from, each with the reason: the
    same id, or the same prompt (the conversation and its responses, in any order).
    """
    ids: set[str] = set()
    prompts: set[Prompt] = set()
    for row in learned:
        ids.add(row.id if isinstance(row, Preference) else row.example_id)
        prompts.add(_prompt(row))
    shared = []
    for record in heldout:
        if record.id in ids:
            shared.append((record, f"the id {record.id!r}"))
        elif _prompt(record) in prompts:
            shared.append((record, "the same conversation and responses"))
    return shared


def _prompt(row: Preference | Trajectory) -> Prompt:
    turns = row.turns if isinstance(row, Preference) else row.query
    if isinstance(turns, str):
        turns = (Turn(role="user", content=turns),)
    return _conversation(turns), tuple(sorted(row.responses))


def _conversation(turns: Sequence[Turn]) -> str:
    return json.dumps([[turn["role"], turn["content"]] for turn in turns])
