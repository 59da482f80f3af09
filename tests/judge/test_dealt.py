"""Requests whose responses are dealt into groups."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest

from grm_jax.critique.parse import Parsed
from grm_jax.errors import UserError
from grm_jax.judge import dealt
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
        # The texts of a random model say nothing of the responses: the caller sets the group.
        group = read[-1]
        return Parsed(tuple(float(index + 1) for index in group), None, f"be {n}", "")

    def sample(self, entry, sample):
        read.append([NAMES.index(r) for r in entry.request.record.responses])
        return original(self, entry, sample)

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
        assert not dealt.is_dealt(request) and request.samples == 4
        return
    assert dealt.is_dealt(request)
    deals = [dealt.deal(request, sample) for sample in range(40)]
    for groups in deals:
        assert 4 * len(groups) == request.samples
        sizes = [len(group) for group in groups]
        assert min(sizes) >= 2 and max(sizes) <= at_once and max(sizes) - min(sizes) <= 1
        shown = collections.Counter(index for group in groups for index in group)
        assert set(shown) == set(range(n))
        twice = [index for index, count in shown.items() if count > 1]
        # In pairs of an odd number one of the first pair keeps the last response company.
        assert twice == ([groups[0][0]] if at_once == 2 and n % 2 else [])
        assert all(len(set(group)) == len(group) for group in groups)
    assert deals == [dealt.deal(request, sample) for sample in range(40)]
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
    assert joined.order == (2, 0, 1) and joined.groups == (2, 1)
    assert joined.shown == [[2, 0], [1]] and first.shown == [[0, 1]]
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
        assert row.groups == (3, 2, 2) and sorted(row.order) == list(range(7))
        assert row.principles == "be 3\n\nbe 2\n\nbe 2" and row.meta is not None
    prompts = [
        p for parts in _parts(judge, request) for part in parts for p in part.prompts.values()
    ]
    assert verdict.usage.prompt_tokens == sum(map(len, prompts))
    # The scalar RM reads each response once, whatever is beside it.
    alone = judge.scalar.scores([(request.record.turns, NAMES[:7])], judge.mesh, 64)[0]
    np.testing.assert_allclose(verdict.scalar, alone, rtol=1e-6)


def _parts(judge, request):
    from grm_jax.judge.prepared import Dealt, prepare

    prepared = prepare(judge, request)
    assert isinstance(prepared, Dealt)
    return prepared.parts


def test_critiques_of_groups_are_those_of_requests_of_their_own(judge):
    session = judge.session(longest_prompt=64, max_new_tokens=12, samples=8)
    request = ask(5, 2, k=2, seed=3)
    ticket = session.add(request)
    other = session.add(ask(4, None, k=3))
    verdict = drain(session)[ticket]
    assert session.idle and other != ticket
    for sample, row in enumerate(verdict.critiques):
        groups = dealt.deal(request, sample)
        tickets = [session.add(dealt.part(request, sample, group)) for group in groups]
        alone = drain(session)
        assert row.text == "\n\n".join(alone[t].critiques[0].text for t in tickets)
    assert len({row.text for row in verdict.critiques}) == 2
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
    assert set(drain(session)) == {kept} and not session._groups
    assert session.idle and session.step() == []


def test_a_group_that_has_no_room_is_refused_before_anything_is_sampled(judge):
    pairs = max(part.longest for parts in _parts(judge, ask(8, 2, k=1)) for part in parts)
    session = judge.session(longest_prompt=pairs, max_new_tokens=12, samples=8)
    with pytest.raises(UserError, match=rf"the prompt has .* and at most {pairs} are read"):
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
    assert [v.critiques[0].groups for v in verdicts] == [(3, 3), None, (2, 2, 2)]
