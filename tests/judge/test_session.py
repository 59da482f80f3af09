"""The open-ended session: requests that come and go, and what they cost one another (nothing)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from grm_jax.critique import Template
from grm_jax.data.synthetic_files import build_tokenizer
from grm_jax.errors import UserError
from grm_jax.judge import scalar as scoring
from grm_jax.judge.expected import ScoreTokens
from grm_jax.judge.request import JudgeRequest, LabelRequest, ScoreOptions
from grm_jax.judge.verdict import Verdict
from grm_jax.sampler.options import SamplingConfig


def ask(n=2, query=" sum 1 2", **options) -> JudgeRequest:
    options = {"max_new_tokens": 12, "method": "vote", **options}
    return JudgeRequest.make(query, [" anna", " ben", " carl"][:n], options=ScoreOptions(**options))


def drain(session) -> dict[int, Any]:
    results = {}
    while not session.idle:
        results |= dict(session.step())
    return results


def texts(verdict) -> list[str]:
    return [row.text for row in verdict.critiques]


def test_what_is_added_while_others_run_gets_what_it_would_get_alone(session):
    request = ask(2, k=5, seed=3)
    ticket = session.add(request)
    alone = drain(session)[ticket]
    others = [session.add(ask(n, query=f" sum {n} {s}", k=3, seed=s)) for n in (1, 2, 3)
              for s in range(2)]  # fmt: skip
    session.step()
    late = session.add(request)
    results = drain(session)
    assert set(results) == {*others, late}
    assert isinstance(alone, Verdict) and texts(results[late]) == texts(alone)
    assert results[late].scalar == alone.scalar and alone.judge == "abc"


def test_a_warm_session_compiles_nothing_for_the_first_request(judge, session):
    """Neither for its critiques nor for the scores of the meta RM and the scalar RM."""
    request = ask(2, k=3, method=None, seed=5)
    ticket = session.add(request)
    cold = drain(session)[ticket]
    warm = judge.session(longest_prompt=64, max_new_tokens=9, samples=8)
    scoring._program.cache_clear()
    warm.warm_up()
    assert warm.idle
    compiled, rows = len(judge.sampler.programs.compilations), scoring._program(
        judge.model, judge.mesh
    )  # fmt: skip
    assert rows._cache_size() == 1
    ticket = warm.add(ask(2, k=3, method=None, seed=5, max_new_tokens=9))
    verdict = drain(warm)[ticket]
    assert len(judge.sampler.programs.compilations) == compiled and rows._cache_size() == 1
    assert verdict.scalar == cold.scalar
    for row, before in zip(verdict.critiques, cold.critiques, strict=True):
        assert before.text.startswith(row.text)


def test_settings_are_those_of_each_request(session):
    cold = session.add(ask(2, k=3, temperature=0.0, order="given"))
    short = session.add(ask(2, k=2, max_new_tokens=3))
    results = drain(session)
    assert len(set(texts(results[cold]))) == 1, "greedy critiques of one order are alike"
    assert all(row.tokens <= 3 for row in results[short].critiques)
    assert {row.failure for row in results[short].critiques} <= {"truncated", "no_box"}


def test_a_session_says_how_many_samples_of_a_request_have_ended(session):
    ticket = session.add(ask(2, k=20, seed=4))
    chat = session.add_chat([{"role": "user", "content": " sum"}], SamplingConfig(max_new_tokens=2))
    seen = [session.finished(ticket)]
    while not session.idle:
        session.step()
        seen.append(session.finished(ticket))
    assert seen[0] == seen[-1] == 0 == session.finished(chat)
    assert len(set(seen)) > 2 and sorted(seen[:-1]) == seen[:-1] and max(seen) < 20


def test_cancelled_requests_give_nothing_and_leave_room(session):
    tickets = [session.add(ask(2, k=8, seed=s)) for s in range(4)]
    session.step()
    for ticket in tickets[:3]:
        session.cancel(ticket)
    assert set(drain(session)) == {tickets[3]}
    session.cancel(tickets[0])  # again: nothing happens
    assert session.idle and session.step() == []


def test_chats_and_scalar_scores_run_beside_verdicts(judge, session):
    messages = [{"role": "user", "content": " sum 1 2"}]
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=6)
    chat = session.add_chat(messages, sampling, n=3, seed=1)
    scalar = session.add_scalar(messages, [" anna", " ben"])
    verdict = session.add(ask(2, k=2))
    results = drain(session)
    replies = results[chat]
    assert len(replies) == 3 and all(len(r.tokens) == len(r.logprobs) <= 6 for r in replies)
    assert replies[0].prompt_tokens == len(judge.tokenizer.chat(messages))
    again = session.add_chat(messages, sampling, n=3, seed=1)
    assert drain(session)[again] == replies
    assert results[scalar].scores == results[verdict].scalar
    np.testing.assert_allclose(
        results[scalar].scores,
        judge.scalar.scores([(messages, [" anna", " ben"])], judge.mesh, 64)[0],
    )
    rows = judge.scalar.examples(messages, [" anna", " ben"])
    assert results[scalar].prompt_tokens == sum(row.length for row in rows)


def test_labels_are_read_beside_verdicts(judge, session):
    asked = LabelRequest(" sum 1 2", (" anna", " ben anna"), (7, 9, 11))
    others = [session.add_labels(LabelRequest(" sum", (" carl",), (5,))), session.add(ask(2, k=2))]
    ticket = session.add_labels(asked)
    gone = session.add_labels(asked)
    session.cancel(gone)
    results = drain(session)
    assert set(results) == {ticket, *others}
    rows = judge.labels.rows(asked)
    assert results[ticket].logprobs == tuple(judge.labels.logprobs(rows))
    assert results[ticket].prompt_tokens == sum(row.length for row in rows)


def test_what_has_no_room_is_refused_at_once(session):
    with pytest.raises(UserError, match=r"the prompt has .* tokens, and at most 64 are read"):
        session.add(ask(2, query=" sum" * 60))
    with pytest.raises(UserError, match="max_new_tokens is 13, and at most 12"):
        session.add(ask(2, max_new_tokens=13))
    with pytest.raises(UserError, match="at most 12"):
        session.add_chat([{"role": "user", "content": " sum"}], SamplingConfig(max_new_tokens=13))
    with pytest.raises(UserError, match=r"responses\[1\]: .* the scalar RM reads 96"):
        session.add_scalar([{"role": "user", "content": " sum"}], ["", " anna" * 100])
    with pytest.raises(UserError, match="at most 64 are read"):
        session.add_labels(LabelRequest(" sum", (" anna", " anna" * 70), (5,)))
    assert session.idle


class Characters:
    """A tokenizer of characters: it writes 10 as two tokens."""

    def __init__(self):
        self.vocabulary = {chr(code): code for code in range(32, 127)}

    def encode(self, text):
        return [ord(character) for character in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.fixture(params=["words", "characters"])
def tokenizer(request):
    return build_tokenizer() if request.param == "words" else Characters()


def test_the_expected_score_is_the_mean_over_the_digits(tokenizer):
    """On a critique and probabilities made by hand."""
    tokens = ScoreTokens(tokenizer)
    template = Template.load("compact")
    text = "\nScores: \\boxed{7, 10}"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    words = {id: tokenizer.decode([id]).strip() for id in tokens.ids}
    assert {str(digit) for digit in range(1, 10)} <= set(words.values())
    watched = np.full((len(ids), len(tokens.ids)), -40.0, np.float32)

    def set_mass(at: int, mass: dict[str, float]) -> None:
        for word, p in mass.items():
            column = next(i for i, id in enumerate(tokens.ids) if words[id] == word)
            watched[at, column] = np.log(p)

    places = [i for i, id in enumerate(ids) if id in words]
    whole = any(word == "10" for word in words.values())
    assert len(places) == (2 if whole else 3)
    set_mass(places[0], {"7": 0.3, "8": 0.1, "9": 0.2})
    set_mass(places[1], {"1": 0.2, "9": 0.2, **({"10": 0.2} if whole else {})})
    if not whole:
        set_mass(places[1] + 1, {"0": 0.75})
    means = tokens.means(ids, text, (7.0, 10.0), watched, template)
    assert means is not None
    first, second = means
    assert first == pytest.approx((7 * 0.3 + 8 * 0.1 + 9 * 0.2) / 0.6)
    ten, one = (0.2, 0.2) if whole else (0.15, 0.05)
    assert second == pytest.approx((10 * ten + one + 9 * 0.2) / (ten + one + 0.2))
    # Where the box is no plain list of whole scores there is none.
    for other in ("\nScores: \\boxed{7}\nScores: \\boxed{9}", "\nScores: \\boxed{7.5, 9}"):
        assert tokens.means(tokenizer.encode(other), other, (7.0, 9.0), watched, template) is None
    with pytest.raises(UserError, match="expected scores"):
        tokens.require(Template.load("judge"))


def test_meta_rm_and_scalar_rm_take_part(judge, session, monkeypatch):
    """With critiques that can be read; the model writes none."""
    from grm_jax.critique.parse import Parsed

    def read(template, text, n, truncated):
        first = sum(map(ord, text)) % 9 + 1
        return Parsed(tuple(float(first + i) for i in range(n)), None, "be right", "")

    monkeypatch.setattr("grm_jax.judge.critiques.read", read)
    request = ask(2, k=4, method=None, seed=11)
    guided = session.add(request)
    hybrid = session.add(ask(2, k=4, method="hybrid", seed=11))
    results = drain(session)
    verdict = results[guided]
    assert verdict.method == "guided" and sum(row.votes for row in verdict.critiques) == 2
    logits = [row.meta for row in verdict.critiques]
    kept = [row.meta for row in verdict.critiques if row.votes]
    assert min(kept) >= sorted(logits)[2] and verdict.critiques[0].principles == "be right"
    mean = np.array(results[hybrid].scores)
    scalar = np.array(verdict.scalar)
    np.testing.assert_allclose(
        results[hybrid].values, mean - mean.mean() + 0.5 * (scalar - scalar.mean()), atol=1e-6
    )
    adaptive = session.add(ask(2, k=8, adaptive=1.0, seed=2))
    assert len(drain(session)[adaptive].critiques) == 4, "the first round decides"
