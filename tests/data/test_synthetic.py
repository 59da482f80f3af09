"""The embedded world: its truth computed again, its splits, its teacher, its tokenizer."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random

import pytest

from grm_jax.critique import parse
from grm_jax.data import synthetic
from grm_jax.data.preferences import read_preferences, require_unique_best
from grm_jax.data.synthetic import Item, Split, Teacher, WorldConfig, make_item, vocabulary
from grm_jax.data.synthetic_files import build_tokenizer, write_world
from grm_jax.data.trajectories import Trajectory, read_trajectories
from grm_jax.tokenizer import load_tokenizer

CONFIG = WorldConfig(cold_start=150, train=150, fresh=60, shifted=30, seed=3)
TOKENIZER = build_tokenizer()


def items(count: int, split: Split = Split.TRAIN, seed: int = 0) -> list[Item]:
    rng = random.Random(seed)
    return [make_item(rng, rng.randint(1, 4), split) for _ in range(count)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_world(root, CONFIG)
    return root


def true_score(query: str, response: str) -> int:
    """10 minus the costs, read off the texts alone, by the rules of the module's docstring."""
    ask, said = query.split(), response.split()
    unit = ask.index("in")
    operands = [int(word) for word in ask[1:unit]]
    answer = {
        "sum": sum,
        "larger": max,
        "smaller": min,
        "after": lambda x: x[0] + 1,
        "repeat": lambda x: x[0],
    }[ask[0]](operands)
    numbers = [word for word in said if word.isdigit()]
    units = [word for word in said if word in ("cm", "kg", "days", "coins")]
    score = 10 - 5 * (numbers[:1] != [str(answer)]) - 5 * (units[:1] != [ask[unit + 1]])
    groups = {
        "start_with": ("hello", "sure", "okay", "greetings"),
        "end_with": ("done", "bye", "end", "finished"),
        "greet": ("anna", "ben", "carl", "dora", "emil", "fay"),
    }
    topics = {
        "fruit": ("apple", "pear", "plum"),
        "animal": ("cat", "dog", "fox"),
        "colour": ("red", "blue", "green"),
        "tool": ("saw", "axe", "drill"),
    }
    wishes = ask[unit + 2 :]
    while wishes:
        wish = wishes.pop(0)
        if wish == "be_polite":
            met = any(word in ("please", "kindly", "gladly") for word in said)
        elif wish == "mention":
            found = [word for word in said if any(word in group for group in topics.values())]
            met = bool(found) and found[0] in topics[wishes.pop(0)]
            wishes = wishes if found else wishes[1:]
        else:
            met = [word for word in said if word in groups[wish]][:1] == [wishes.pop(0)]
        score -= 3 * (not met)
    return score


@pytest.mark.parametrize("split", Split)
def test_labels_are_the_truth(split):
    for item in items(400, split):
        truth = [true_score(item.query, response) for response in item.response_texts]
        if len(truth) == 1:
            assert item.labels == [float(truth[0] >= 6)]
        else:
            assert item.labels == truth
            assert truth.count(max(truth)) == 1


def held_operands(item: Item) -> bool:
    return len(item.operands) == 2 and (3 * item.operands[0] + 7 * item.operands[1]) % 10 == 1


def held_combination(item: Item) -> bool:
    words = item.query.split()
    phrase = {
        "sum": ("end_with", "bye"),
        "larger": ("start_with", "sure"),
        "repeat": ("greet", "fay"),
        "after": ("mention", "tool"),
        "smaller": ("in", "kg"),
    }[words[0]]
    return phrase in itertools.pairwise(words)


def test_splits_hold_what_they_say_and_training_holds_neither():
    expected = {
        Split.TRAIN: (False, False),
        Split.OPERANDS: (True, False),
        Split.COMBINATIONS: (False, True),
    }
    for split, (operands, combination) in expected.items():
        for item in items(300, split):
            assert (held_operands(item), held_combination(item)) == (operands, combination)
    seen = {item.operands for item in items(2000) if len(item.operands) == 2}
    unseen = {item.operands for item in items(300, Split.OPERANDS)}
    assert len(unseen) >= 3 and not seen & unseen


def test_the_world_has_variety_and_both_single_labels():
    found = items(2000)
    assert {item.task for item in found} == set(synthetic.TASKS)
    singles = [item.labels[0] for item in found if len(item.responses) == 1]
    assert 0.35 < sum(singles) / len(singles) < 0.65
    best = collections.Counter(
        max(range(len(item.labels)), key=item.labels.__getitem__)
        for item in found
        if len(item.labels) == 3
    )
    assert min(best.values()) > 0.25 * sum(best.values()), "no favourite place"
    assert all(len(item.criteria) == 5 for item in found), "answer, unit, three wishes"


def test_the_perfect_teacher_never_contradicts_the_truth():
    rng = random.Random(0)
    perfect = Teacher(1.0, (0.0, 0.0), (0.0, 0.0), (0.0, 0.0), 1.0)
    for item in items(200):
        text = perfect.write(rng, item)
        parsed = parse(text, len(item.responses), low=0, high=10)
        assert parsed.scores is not None
        criteria = parsed.principles.split()[::2]
        assert len(criteria) == 3 and set(criteria) <= set(item.criteria)
        costs = {c: 5 if c in ("answer", "unit") else 3 for c in criteria}
        for score, checks in zip(parsed.scores, item.checks, strict=True):
            partial = max(1, 10 - sum(costs[c] for c in criteria if not checks[c].ok))
            assert score == (partial >= 6 if len(item.responses) == 1 else partial)


def test_the_noisy_teacher_is_often_but_not_always_right():
    rng = random.Random(1)
    right = total = 0
    for item in items(600):
        if len(item.labels) == 1:
            continue
        scores = parse(Teacher().write(rng, item), len(item.labels)).scores
        assert scores is not None
        best = max(range(len(scores)), key=item.labels.__getitem__)
        right += all(scores[best] > s for i, s in enumerate(scores) if i != best)
        total += 1
    assert 0.3 < right / total < 0.8


def test_every_text_of_the_world_is_in_the_vocabulary():
    rng = random.Random(2)
    for split in Split:
        for item in items(150, split):
            for text in (item.query, *item.response_texts, Teacher().write(rng, item)):
                ids = TOKENIZER.encode(text)
                assert TOKENIZER.decode(ids) == text
                assert "<unk>" not in TOKENIZER.decode(ids, show_control=True)


def test_the_vocabulary_has_each_piece_once_and_is_used():
    pieces = vocabulary()
    assert len(pieces) == len(set(pieces))
    assert TOKENIZER.vocab_size == len(pieces) + 5
    assert all(len(TOKENIZER.encode(piece)) == 1 for piece in pieces)
    assert TOKENIZER.encode(" 10") != TOKENIZER.encode(" 1") + TOKENIZER.encode(" 0")
    # What nobody writes would waste an embedding and hide a mistake.
    rng = random.Random(5)
    seen: set[int] = set()
    for split in Split:
        for item in items(800, split):
            for text in (item.query, *item.response_texts, Teacher().write(rng, item)):
                seen |= set(TOKENIZER.encode(text))
    hints = {TOKENIZER.encode(p)[0] for p in (" best",)}
    unused = {TOKENIZER.decode([i]) for i in range(5, TOKENIZER.vocab_size)} - {
        TOKENIZER.decode([i]) for i in seen | hints
    }
    numbers = {" 0", *(f" {n}" for n in range(13, 19))}  # answers nobody is led to
    scores = {"3", "6", "8", "9"}  # no costs of 3 and 5 add up to them
    assert unused <= numbers | scores


def test_foreign_words_are_unknown_and_controls_are_text():
    assert "<unk>" in TOKENIZER.decode(TOKENIZER.encode(" zebra"), show_control=True)
    assert not set(TOKENIZER.encode(" <eos> <judge>")) & (TOKENIZER.control_ids - {4})


def test_the_tokenizer_directory_is_the_tokenizer(world):
    loaded = load_tokenizer(world / "tokenizer")
    messages = [{"role": "user", "content": " sum 1 2 in cm [A] 3"}]
    assert loaded.chat(messages) == TOKENIZER.chat(messages)
    assert loaded.stop_ids == TOKENIZER.stop_ids == (TOKENIZER.eos_id,)
    text = "Specific Criteria: answer high"
    assert loaded.completion(text) == [*TOKENIZER.encode(text), TOKENIZER.eos_id]
    whole = loaded.chat(
        [*messages, {"role": "assistant", "content": text}], generation_prompt=False
    )
    assert whole == loaded.chat(messages) + loaded.completion(text)


def test_the_files_hold_what_the_config_says(world):
    cold = read_trajectories(world / "cold_start.jsonl")
    train, heldout = (read_preferences(world / f"{n}.jsonl") for n in ("train", "heldout"))
    assert len(cold) == 150 and all(isinstance(row, Trajectory) for row in cold)
    assert len(train) == 150 and len({record.id for record in [*train, *heldout]}) == 150 + 120
    require_unique_best(train)
    domains = collections.Counter(record.domain for record in heldout)
    assert domains == {"fresh": 60, "operands": 30, "combinations": 30}
    for row in cold:
        assert isinstance(row, Trajectory)
        parsed = parse(row.text, len(row.responses), low=0, high=10)
        assert parsed.scores is not None


def test_heldout_items_do_not_occur_in_the_training_files(tmp_path, monkeypatch):
    """In a small world, where single responses repeat: neither in train nor in the cold start."""
    monkeypatch.setattr("grm_jax.data.synthetic_files.SIZES_OF_N", ((1, 2), (0.9, 0.1)))
    monkeypatch.setattr(synthetic, "TASKS", ["repeat"])
    monkeypatch.setattr(synthetic, "UNITS", ["cm"])
    monkeypatch.setattr(synthetic, "WISHES", ["polite", "start", "ending"])
    monkeypatch.setitem(synthetic.SLOTS, "start", ["hello", "sure"])
    monkeypatch.setitem(synthetic.SLOTS, "ending", ["done", "end"])
    write_world(tmp_path, dataclasses.replace(CONFIG, shifted=0, fresh=20))

    def content(row) -> tuple[str, ...]:
        return (row.query, *sorted(row.responses))

    fresh = {content(row) for row in read_preferences(tmp_path / "heldout.jsonl")}
    cold = {content(row) for row in read_trajectories(tmp_path / "cold_start.jsonl")}
    train = {content(row) for row in read_preferences(tmp_path / "train.jsonl")}
    assert cold & train, "small enough that items repeat"
    assert not fresh & train
    assert not fresh & cold


def test_writing_again_gives_the_same_bytes(world, tmp_path):
    write_world(tmp_path, CONFIG)
    for name in ("cold_start.jsonl", "train.jsonl", "heldout.jsonl", "world.json"):
        assert (tmp_path / name).read_bytes() == (world / name).read_bytes()
    write_world(tmp_path, dataclasses.replace(CONFIG, seed=4))
    assert (tmp_path / "train.jsonl").read_bytes() != (world / "train.jsonl").read_bytes()


def test_what_a_world_leaves_out_of_training_is_in_its_own_held_out_records(tmp_path):
    config = dataclasses.replace(CONFIG, unseen_task="smaller", unseen_defect="unit")
    write_world(tmp_path, config)

    def violates(row) -> bool:
        asked = row.query.split()[row.query.split().index("in") + 1]
        return any(asked not in response.split() for response in row.responses)

    cold = list(read_trajectories(tmp_path / "cold_start.jsonl"))
    train = list(read_preferences(tmp_path / "train.jsonl"))
    assert not any(row.query.startswith(" smaller") or violates(row) for row in (*cold, *train))
    heldout = list(read_preferences(tmp_path / "heldout.jsonl"))
    by_domain = collections.Counter(row.domain for row in heldout)
    assert by_domain == {
        "fresh": 60, "operands": 30, "combinations": 30, "task": 30, "defect": 30
    }  # fmt: skip
    for row in heldout:
        assert row.query.startswith(" smaller") == (row.domain == "task")
        assert violates(row) == (row.domain == "defect")


def test_a_response_does_not_take_the_space_of_the_next_marker():
    """Whatever a response ends in, the marker behind it stays the token that the judge knows."""
    tokenizer = build_tokenizer()
    (marker,) = tokenizer.encode(" [B]")
    for ending in (" 7 cm", ",", ", ", " 1,", ", 1", "\n", " ", "\nScores: \\boxed{1, 2}", " ["):
        assert tokenizer.encode(f" [A] 7{ending} [B] 8").count(marker) == 1, ending
    scores = tokenizer.encode("\nScores: \\boxed{10, 5, 1}")
    assert [tokenizer.decode([id]) for id in scores] == [
        "\nScores: \\boxed{", "10", ", ", "5", ", ", "1", "}"
    ]  # fmt: skip
