"""Rejection rules, and taking up a sampling that was cut off."""

from __future__ import annotations

import dataclasses
import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from grm_jax.critique.template_set import TemplateConfig
from grm_jax.data.rows import DataError
from grm_jax.data.trajectories import to_trajectory
from grm_jax.judge.prompts import Prompts
from grm_jax.training import meta_rm, rft, sampling
from grm_jax.training.options import RFT, MetaRM


def judged(record, plain, hinted=(), threshold=None):
    return list(rft._judge(record, list(plain), list(hinted), threshold))


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([(1, 9), (9, 1), (2, 8)], [True, False, True]),
        ([(1, 9), (2, 8), (3, 7)], [False, False, False]),  # too easy
        ([(9, 1), (8, 2), (5, 5)], [False, False, False]),  # none correct; a tie is not
        ([(1, 9), None, (5, 5)], [True, False, False]),  # unparsed is incorrect
    ],
)
def test_correct_samples_are_kept_unless_all_are(make_critique, make_record, scores, kept):
    record = make_record("r", (0, 1))
    rows = judged(record, [make_critique("r", i, s) for i, s in enumerate(scores)])
    assert [row.kept for row in rows] == kept
    assert [row.correct for row in rows] == [s is not None and s[1] > s[0] for s in scores]
    assert not any(row.hinted for row in rows)


def test_hinted_samples_are_kept_if_correct_even_where_all_are(make_critique, make_record):
    record = make_record("r", (0, 1))
    plain = [make_critique("r", i, (1, 9)) for i in range(3)]
    for scores, kept in (((1, 9), True), ((9, 1), False), (None, False)):
        *rows, last = judged(record, plain, [make_critique("r", 3, scores)])
        assert [row.kept for row in rows] == [False] * 3
        assert last.hinted and last.kept == kept and last.sample == 3


def test_singles_are_correct_if_they_say_the_label(make_critique, make_record):
    record = make_record("r", (0,))
    rows = judged(record, [make_critique("r", i, s) for i, s in enumerate([(0,), (1,)])])
    assert [(row.correct, row.kept) for row in rows] == [(True, True), (False, False)]


def test_singles_of_another_range_are_correct_on_their_side_of_the_middle(
    make_critique, make_record
):
    critiques = [make_critique("r", i, s) for i, s in enumerate([(85,), (1,), (50,)])]
    for label, corrects in ((1, [True, False, False]), (0, [False, True, False])):
        rows = judged(make_record("r", (label,)), critiques, threshold=50.0)
        assert [(row.correct, row.kept) for row in rows] == [(c, c) for c in corrects]


def test_the_report_names_what_can_not_be_read(make_critique, make_record, caplog):
    texts = [("\\boxed{8 9}", "separators")] * 3 + [("\\boxed{8/9}", "separators")]
    texts += [("\x1b none", "no_box"), ("\\boxed{\x1b7}", "wrong_count")]
    record, read = make_record("r", (0, 1)), make_critique("r", 0, (1, 9))
    rows = [to_trajectory(record, read, True, kept=True)]
    for text, failure in texts:
        critique = dataclasses.replace(read, text=text, scores=None, failure=failure)
        rows.append(to_trajectory(record, critique, False, kept=False))
    with caplog.at_level(logging.INFO, "grm_jax"):
        rft.report(rows, RFT())
    said = caplog.text
    assert "separators: 4 critiques; the commonest box (3 times): \\boxed{8 9}" in said
    assert "no_box: 1 critiques\n" in said and "\\boxed{?7}" in said


def test_trajectories_are_in_the_records_order(make_critique, make_record):
    record = make_record("r", (0, 5, 9))
    row = to_trajectory(record, make_critique("r", 0, (1, 2, 3), order=(2, 0, 1)), True, kept=True)
    assert row.responses == record.responses and row.labels == (0.0, 5.0, 9.0)
    assert row.scores == (1.0, 2.0, 3.0)
    assert row.shown == ["response 2", "response 0", "response 1"]
    assert row.order == (2, 0, 1) and row.query == "q"
    unread = to_trajectory(record, make_critique("r", 0, None, order=(0, 1, 2)), False, kept=False)
    assert unread.scores is None and unread.failure == "no_box"


CONFIG = RFT(samples=2, hinted=True, chunk=4)


def test_without_orders_all_samples_of_a_record_see_one(make_record):
    record = make_record("r", (0, 1, 2))

    def orders(order) -> list[tuple[int, ...]]:
        prompts = Prompts(None, TemplateConfig(), order=order)  # pyright: ignore[reportArgumentType]
        return prompts.orders(record, 4, "rft")

    assert len(set(orders(RFT().orders))) == 1
    assert len(set(orders(RFT(orders=2).orders))) == 2
    assert orders(RFT().orders) == orders("one")  # as before there were `orders`


def test_the_meta_rm_reads_other_orders_than_rft(tmp_path, make_record):
    """Each stage asks for critiques in orders of its own; a stage's hinted row has its order."""
    prompts = Prompts(None, TemplateConfig(), order="one")  # pyright: ignore[reportArgumentType]
    asked: dict[str, set[str]] = {"rft": set(), "meta_rm": set()}
    records = [make_record(f"record {i}", (0, 1, 2, 3)) for i in range(20)]

    def run(stage: str) -> Any:
        def critiques(params, part, samples, sampling, key, *, hinted=False, salt="", progress):
            asked[stage].add(salt)
            return {record.id: [] for record in part}

        return SimpleNamespace(
            records=records,
            model=SimpleNamespace(compute_dtype="float32"),
            params=lambda *_, **__: {},
            stage_key=lambda _: None,
            sampler=SimpleNamespace(take=lambda params: params),
            new_critic=lambda _: SimpleNamespace(critiques=critiques, prompts=prompts),
        )

    rft_config, meta_config = RFT(), MetaRM()
    rft.sample_trajectories(
        SimpleNamespace(run=run("rft")), rft_config, "", records, tmp_path / "a"
    )  # pyright: ignore[reportArgumentType]
    meta_stage = SimpleNamespace(run=run("meta_rm"), directory=tmp_path)
    with pytest.raises(DataError, match="the file is empty"):  # the stub writes nothing
        meta_rm.sampled_rows(meta_stage, meta_config, "", records)  # pyright: ignore[reportArgumentType]
    (a,), (b,) = asked["rft"], asked["meta_rm"]
    same = [prompts.orders(record, 1, a) == prompts.orders(record, 1, b) for record in records]
    assert sum(same) < 5  # of 24 orders each


def lines(records: int) -> bytes:
    rows = [
        {"id": f"r{i}", "sample": s, "critique": "ä\u2028"}
        for i in range(records)
        for s in range(3)
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("content", "done"),
    [
        (b"", 0),
        (lines(3), 0),
        (lines(4), 4),
        (lines(7) + b'{"id": "r', 4),
        (lines(8)[:-1], 4),  # the newline of the last row is missing
        (lines(8) + b'{"id": "\xc3', 8),  # within a character
        (lines(10), 10),  # all of them, though not a whole chunk
        (lines(9) + lines(1)[:40], 8),
    ],
    ids=range(8),
)
def test_a_cut_off_file_is_cut_back_to_whole_chunks(tmp_path, content, done):
    partial = tmp_path / "trajectories.jsonl.partial"
    partial.write_bytes(content)
    assert sampling.resume(partial, chunk=4, rows_each=3, total=10) == done
    assert partial.read_bytes() == lines(done)


def test_without_a_file_it_begins(tmp_path):
    assert sampling.resume(tmp_path / "none", chunk=4, rows_each=3, total=10) == 0


def test_without_hints_a_record_has_fewer_rows(tmp_path):
    partial = tmp_path / "p"
    partial.write_bytes(b'{"a": 1}\n' * 8)
    assert sampling.resume(partial, chunk=4, rows_each=2, total=100) == 4
