"""Requests whose responses are dealt into groups."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest

from grm_jax.critique.parse import Parsed
from grm_jax.errors import UserError
from grm_jax.judge import dealt
from grm_jax.judge.prepared import Dealt, prepare
from grm_jax.judge.request import JudgeRequest, ScoreOptions
from grm_jax.judge.verdict import Judgement

NAMES = [" anna", " ben", " carl", " dora", " emil", " fay", " cat", " dog", " fox"]


def ask(n, at_once, k=4, **options) -> JudgeRequest:
    options = {"max_new_tokens": 12, "method": "vote", **options}
    said = ScoreOptions(k=k, at_once=at_once, **options)
    return JudgeRequest.make(" sum 1 2", NAMES[:n], options=said)


def drain(session):
    results = {}
    while not session.idle:
        results |= dict(session.step())
    return results


@pytest.fixture
def readable(monkeypatch):
    """Critiques that can be read: a score is the response's place in NAMES plus one. The model
    writes none. Returns the groups that were read."""
    read = []

    def scores(template, text, n, truncated):
        # The texts of a random model say nothing of the responses: the caller says which they are.
        group = read[-1]
        return Parsed(tuple(float(index + 1) for index in group), None, f"be {n}", "")

    def sample(self, entry, sample, order):
        record = entry.part(sample.index) if isinstance(entry, Dealt) else entry.request.record
        read.append([NAMES.index(record.responses[i]) for i in order])
        return original(self, entry, sample, order)

    from grm_jax.judge.session import JudgeSession

    original = JudgeSession._judgement
    monkeypatch.setattr(JudgeSession, "_judgement", sample)
    monkeypatch.setattr("grm_jax.judge.critiques.read", scores)
    return read


@pytest.mark.parametrize("at_once", [2, 3, 4, 7])
@pytest.mark.parametrize("n", [3, 5, 8, 9])
def test_every_response_is_dealt_once_and_none_is_alone(n, at_once):
    request = ask(n, at_once)
    if n <= at_once:
        assert request.groups == 1 and request.samples == 4
        return
    deals = [dealt.deal(request, sample) for sample in range(40)]
    for groups in deals:
        assert 4 * len(groups) == request.samples and len(groups) == request.groups
        sizes = [len(group) for group in groups]
        assert max(sizes) == dealt.size(request)
        assert min(sizes) >= 2 and max(sizes) <= at_once and max(sizes) - min(sizes) <= 1
        shown = collections.Counter(index for group in groups for index in group)
        assert set(shown) == set(range(n))
        twice = [index for index, count in shown.items() if count > 1]
        # In pairs of an odd number one of the first pair keeps the last response company.
        assert twice == ([groups[0][0]] if at_once == 2 and n % 2 else [])
        assert all(len(set(group)) == len(group) for group in groups)
    assert deals == [dealt.deal(request, sample) for sample in range(40)]
    other = ask(n, at_once, seed=1)
    assert deals != [dealt.deal(other, sample) for sample in range(40)]
    together = {pair for groups in deals for g in groups for pair in itertools.pairwise(g)}
    assert len(together) > n, "the groups change from critique to critique"


def critique(scores, *, sample=0, **fields) -> Judgement:
    fields = {"failure": None if scores else "no_box", "finish_reason": "stop", **fields}
    n = len(scores or (0, 0))
    return Judgement(example_id="r", sample=sample, order=tuple(range(n)), scores=scores, **fields)


def test_scores_of_groups_come_back_to_their_responses():
    request = ask(3, 2)
    groups = [(2, 0), (1, 2)]
    first = critique((7.0, 3.0), text="a", meta=1.0, tokens=4, expected=(6.5, 3.5))
    second = critique((5.0, 9.0), text="b", meta=2.0, tokens=5, expected=(5.5, 8.0))
    joined = dealt.join(request, 1, groups, [first, second])
    # The 9 of response 2 in the second group, where it keeps 1 company, does not count.
    assert joined.scores == (3.0, 5.0, 7.0) and joined.expected == (3.5, 5.5, 6.5)
    assert joined.order == (2, 0, 1) and joined.shown == ((2, 0), (1, 2))
    assert first.shown == ((0, 1),)
    assert (joined.text, joined.meta, joined.tokens, joined.sample) == ("a\n\nb", 1.5, 9, 1)
    none = critique(None, text="c", finish_reason="length")
    failed = dealt.join(request, 1, groups, [first, none])
    assert (failed.scores, failed.failure, failed.meta) == (None, "no_box", None)
    assert failed.expected is None and failed.finish_reason == "length"
    drawn = dealt.join(request, 1, groups, [first, critique((5.0, 9.0))])
    assert drawn.scores == (3.0, 5.0, 7.0) and drawn.expected is None


def test_a_verdict_on_more_responses_than_are_read_at_once(judge, readable):
    session = judge.session(longest_prompt=64, max_new_tokens=12, samples=8)
    request = ask(7, 3, k=5)
    ticket = session.add(request)
    results = drain(session)
    assert list(results) == [ticket], "no verdict on a group comes out"
    verdict = results[ticket]
    assert verdict.scores == tuple(range(1, 8)) and verdict.winner == 6 and len(verdict.scalar) == 7
    assert sorted(map(len, readable)) == [2] * 10 + [3] * 5
    assert verdict.usage.samples == 15 == request.samples
    for row in verdict.critiques:
        assert list(map(len, row.groups)) == [3, 2, 2] and sorted(row.order) == list(range(7))
        assert row.order == sum(row.groups, ())
        assert row.principles == "be 3\n\nbe 2\n\nbe 2" and row.meta is not None
    prompts = {group: prompt_of(judge, request, group) for row in verdict.critiques
               for group in row.groups}  # fmt: skip
    assert verdict.usage.prompt_tokens == sum(map(len, prompts.values()))
    # The scalar RM reads each response once, whatever is beside it.
    alone = judge.scalar.scores([(request.record.turns, NAMES[:7])], judge.mesh, 64)[0]
    np.testing.assert_allclose(verdict.scalar, alone, rtol=1e-6)


def prompt_of(judge, request, group):
    """The prompt of a group's responses, as a request of its own has it."""
    alone = JudgeRequest.make(
        " sum 1 2",
        [NAMES[i] for i in group],
        options=ScoreOptions(k=1, order="given", max_new_tokens=12),
    )
    return prepare(judge, alone).prompts[tuple(range(len(group)))]


def test_groups_are_shown_in_prompts_of_their_own(judge, monkeypatch):
    session = judge.session(longest_prompt=64, max_new_tokens=12, samples=8)
    request = ask(5, 2, k=3, seed=3)
    asked = []
    add = session._session.add
    monkeypatch.setattr(session._session, "add", lambda r, s: (asked.append(r), add(r, s)))
    ticket = session.add(request)
    session.add(ask(4, None, k=3))
    verdict = drain(session)[ticket]
    prompts = {i: r.prompt for r in asked if r.example_id == str(ticket) for i in r.samples}
    assert sorted(prompts) == list(range(9)) and verdict.usage.samples == 9
    for sample, row in enumerate(verdict.critiques):
        assert list(row.groups) == dealt.deal(request, sample)
        for place, group in enumerate(row.groups):
            assert prompts[3 * sample + place] == prompt_of(judge, request, group)
    assert all(len(prompt) <= prepare(judge, request).longest for prompt in prompts.values())
    # The same request gets the same critiques, whatever runs beside it.
    again = session.add(request)
    assert [row.text for row in drain(session)[again].critiques] == [
        row.text for row in verdict.critiques
    ]


def test_guided_adaptive_and_hybrid_verdicts_of_groups(judge, readable, monkeypatch):
    def logits(self, examples, mesh, tokens):
        return [float(sum(example.completion) % 7) for example in examples]

    monkeypatch.setattr(type(judge.meta), "logits", logits)
    session = judge.session(longest_prompt=64, max_new_tokens=12, samples=8)
    guided = session.add(ask(5, 3, k=4, method=None))
    adaptive = session.add(ask(5, 3, k=8, adaptive=1.0))
    hybrid = session.add(ask(5, 3, k=2, method="hybrid"))
    results = drain(session)
    assert results[guided].method == "guided"
    metas = sorted(row.meta for row in results[guided].critiques)
    kept = [row.meta for row in results[guided].critiques if row.votes]
    assert len(set(metas)) > 1 and sorted(kept) == metas[2:]
    assert len(results[adaptive].critiques) == 4, "the first round decides"
    scores, scalar = np.asarray(results[hybrid].scores), np.asarray(results[hybrid].scalar)
    np.testing.assert_allclose(
        results[hybrid].values, scores - scores.mean() + 0.5 * (scalar - scalar.mean()), atol=1e-6
    )


def test_a_cancelled_request_takes_its_groups_along(judge):
    session = judge.session(longest_prompt=64, max_new_tokens=12, samples=8)
    gone, kept = session.add(ask(7, 2, k=8)), session.add(ask(2, None, k=2))
    session.step()
    session.cancel(gone)
    assert set(drain(session)) == {kept}
    assert session.idle and session.step() == []


def test_a_group_that_has_no_room_is_refused_before_anything_is_sampled(judge):
    pairs = prepare(judge, ask(8, 2)).longest
    session = judge.session(longest_prompt=pairs, max_new_tokens=12, samples=8)
    with pytest.raises(
        UserError, match=rf"at most {pairs} are read; .* fewer responses \(at_once\)"
    ):
        session.add(ask(8, 7))
    assert session.idle
    ticket = session.add(ask(8, 2, k=1))
    assert len(drain(session)[ticket].critiques[0].order) == 8


@pytest.mark.parametrize("at_once", [1, 0, 2.0, True, 257])
def test_at_once_is_a_whole_number_of_two_or_more(at_once):
    with pytest.raises(UserError, match=r"at_once is .* from 2 to 256"):
        ask(3, at_once)


def test_many_requests_with_and_without_groups(judge, readable):
    requests = [ask(6, 4, k=2), ask(2, 4, k=2), ask(6, 2, k=1)]
    verdicts = judge.score_many(requests)
    assert [len(v.scores) for v in verdicts] == [6, 2, 6]
    assert [v.usage.samples for v in verdicts] == [4, 2, 3]
    assert [len(v.critiques[0].shown) for v in verdicts] == [2, 1, 3]


def test_a_stream_that_is_stopped_early_leaves_nothing_behind(judge):
    requests = [ask(7, 2, k=8, seed=seed) for seed in range(3)] + [ask(2, 2, k=1)]
    first = next(iter(judge.stream(requests)))
    assert first[0] in range(4)
    assert judge._session.idle


@pytest.mark.parametrize("order", ["given", "one"])
def test_an_order_that_groups_can_not_keep_is_refused(judge, order):
    with pytest.raises(UserError, match=f"order is '{order}' and at_once 2: .* leave one"):
        prepare(judge, ask(3, 2, order=order))
    assert prepare(judge, ask(2, 2, order=order)).longest


def test_a_request_that_is_not_dealt_is_named_as_before():
    """Files of earlier versions go on."""
    digest = ask(3, None).digest
    assert digest == ask(3, 3).digest == ask(3, 9).digest == "47ff13a45d1e28248f57"
    assert len({digest, ask(3, 2).digest, ask(8, 3).digest, ask(8, 4).digest}) == 4


@pytest.mark.parametrize("adaptive", [None, 0.9])
def test_a_round_is_known_before_it_begins(judge, adaptive):
    whole = prepare(judge, ask(2, None, k=12, adaptive=adaptive))
    upcoming = whole.upcoming
    assert len(upcoming) == 2 and whole.asked == 0
    begun = 12 if adaptive is None else 4
    assert sorted(itertools.chain.from_iterable(upcoming.values())) == list(range(begun))
    assert {len(of) for of in upcoming.values()} == {begun // 2}, "half see each order"
    assert whole.next_round() == upcoming and whole.asked == begun
    groups = prepare(judge, ask(3, 2, k=12, adaptive=adaptive))
    assert sorted(itertools.chain.from_iterable(groups.upcoming.values())) == list(range(2 * begun))
