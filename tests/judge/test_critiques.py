"""Records to critiques with a sampler that returns prepared texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import pytest

from grm_jax.critique import Template, shuffle
from grm_jax.critique.template_set import TemplateConfig
from grm_jax.data.preferences import Preference
from grm_jax.data.synthetic_files import build_tokenizer
from grm_jax.judge.critiques import AdaptiveK, Critic, chunks
from grm_jax.judge.prompts import Prompts
from grm_jax.sampler.options import SamplingConfig
from grm_jax.sampler.schedule import Request, Sample

TEMPLATES = TemplateConfig("compact", "compact_single", "compact_meta")
SAMPLING = SamplingConfig()
KEY = jax.random.key(0)
TOKENIZER = build_tokenizer()
# Single words, so that a response can be found again in a prompt.
WORDS = (" anna", " ben", " carl", " dora")


def record(id: str = "r", n: int = 3, best: int = 0, **more) -> Preference:
    labels = (1.0,) if n == 1 else tuple(float(i == best) for i in range(n))
    return Preference(id, ({"role": "user", "content": " sum 1 2"},), WORDS[:n], labels, **more)


def box(*scores: int, end: str = "}") -> str:
    return "\nScores: \\boxed{" + ", ".join(map(str, scores)) + end


class StubSampler:
    """Writes what `write(request, index)` says: a text, or (text, finish reason)."""

    def __init__(self, write: Callable[[Request, int], str | tuple[str, str]]):
        self.write = write
        self.requests: list[Request] = []
        self.key = None

    def sample(
        self, params, requests, sampling, key, *, wanted=lambda request: True, together=None
    ):
        del params, sampling
        self.requests, self.key, self.together = list(requests), key, together
        for request in reversed(requests):  # in no particular order
            for index in reversed(request.samples):
                if not wanted(request):
                    continue
                written = self.write(request, index)
                text, reason = written if isinstance(written, tuple) else (written, "stop")
                tokens = TOKENIZER.encode(text) + [TOKENIZER.eos_id] * (reason == "stop")
                yield Sample(
                    request.example_id,
                    index,
                    np.asarray(tokens, np.int32),
                    np.full(len(tokens), -1.0, np.float32),
                    reason,  # pyright: ignore[reportArgumentType]
                )


def shown(request: Request) -> list[str]:
    """The responses in the order in which the prompt shows them."""
    text = TOKENIZER.decode(request.prompt)
    return sorted((w for w in WORDS if w in text), key=text.index)


def score_by_name(request: Request, index: int) -> str:
    """A judge that knows the truth: anna 4, ben 3, carl 2, dora 1, wherever they stand."""
    scores = [4 - WORDS.index(word) for word in shown(request)]
    return "Specific Criteria: answer high\nAnalysis: [A]" + box(*scores)


def make_critic(write=score_by_name, **options) -> tuple[Critic, StubSampler]:
    stub = StubSampler(write)
    return Critic(stub, Prompts(TOKENIZER, TEMPLATES, **options)), stub  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("order", ["balanced", "random", "one", "given"])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_scores_come_back_in_the_records_order(order, n):
    critic, _ = make_critic(order=order)
    found = critic.critiques({}, [record(n=n), record("s", n=n, best=1)], range(8), SAMPLING, KEY)
    assert list(found) == ["r", "s"]
    for critiques in found.values():
        assert [c.sample for c in critiques] == list(range(8))
        for c in critiques:
            assert c.scores == (4.0, 3.0, 2.0, 1.0)[:n]
            assert c.failure is None and c.finish_reason == "stop"
            assert shuffle(WORDS[:n], c.order) == shown(Request("", c.prompt, ()))
            assert c.text.endswith("}") and c.ids[-1] == TOKENIZER.eos_id
            assert len(c.logprobs) == len(c.ids) == c.tokens


def test_each_distinct_order_is_one_prompt():
    for order, most in (("balanced", 3), ("random", 6), ("one", 1), ("given", 1)):
        critic, stub = make_critic(order=order)
        critic.critiques({}, [record()], range(12), SAMPLING, KEY)
        prompts = [r.prompt for r in stub.requests]
        assert len(set(prompts)) == len(prompts) <= most
        assert sorted(i for r in stub.requests for i in r.samples) == list(range(12))
        if order == "balanced":
            assert sorted(len(r.samples) for r in stub.requests) == [4, 4, 4]


def test_orders_depend_on_seed_salt_and_id_alone():
    critic, _ = make_critic(order="random")
    usual = critic.prompts.orders(record(), 8)
    assert critic.prompts.orders(record(), 8) == usual
    assert critic.prompts.orders(record(), 3) == usual[:3]
    assert critic.prompts.orders(record("other"), 8) != usual
    assert critic.prompts.orders(record(), 8, "step 2") != usual
    assert make_critic(order="random", seed=1)[0].prompts.orders(record(), 8) != usual


def test_one_order_a_group_that_changes_with_the_step():
    critic, _ = make_critic(order="one")
    seen = {tuple(critic.prompts.orders(record(), 4, f"step {step}")) for step in range(30)}
    assert all(len(set(orders)) == 1 for orders in seen)
    assert len(seen) == 6


def test_a_number_of_orders_is_taken_in_turn():
    one = Prompts(TOKENIZER, TEMPLATES, order="one").orders(record(), 1, "step 1")
    for several in (1, 2, 3):
        found = Prompts(TOKENIZER, TEMPLATES, order=several).orders(record(), 7, "step 1")
        assert found[0] == one[0] and len(set(found)) == several
        assert found == [found[i % several] for i in range(7)]
        # No response stands in the same place twice.
        assert all(len({order[p] for order in found}) == several for p in range(3))


def test_the_hint_stands_only_in_hinted_prompts_and_follows_the_order():
    critic, stub = make_critic(order="balanced")
    critic.critiques({}, [record(best=1)], range(3), SAMPLING, KEY)
    assert not any("best" in TOKENIZER.decode(r.prompt) for r in stub.requests)
    critic.critiques({}, [record(best=1)], range(3), SAMPLING, KEY, hinted=True)
    places = set()
    for request in stub.requests:
        text = TOKENIZER.decode(request.prompt)
        letter = "ABC"[shown(request).index(" ben")]
        assert text.rstrip().endswith(f"best [{letter}]")
        places.add(letter)
    assert places == {"A", "B", "C"}


@pytest.mark.parametrize(("label", "hint"), [(1.0, "best [A]"), (0.0, "best none")])
def test_single_responses_have_their_own_template_and_hint(label, hint):
    critic, stub = make_critic(lambda request, index: box(1) if index else box(2))
    one = dataclasses.replace(record(n=1), labels=(label,))
    found = critic.critiques({}, [one], range(2), SAMPLING, KEY, hinted=True)["r"]
    assert critic.prompts.template(one).name == "compact_single"
    assert critic.prompts.template(record(n=2)).name == "compact"
    assert TOKENIZER.decode(stub.requests[0].prompt).endswith(hint)
    assert found[0].scores is None and found[0].failure == "out_of_range"  # 0 or 1
    assert found[1].scores == (1.0,)


@pytest.mark.parametrize(
    ("written", "failure"),
    [
        (box(1, 2), "wrong_count"),
        (box(0, 2, 3), "out_of_range"),
        ("\nAnalysis: [A] yes", "no_box"),
        ((box(1, 2, 3, end=""), "length"), "truncated"),
        (("\nAnalysis: [A]", "length"), "truncated"),
    ],
)
def test_failures_are_named_and_have_no_scores(written, failure):
    critic, _ = make_critic(lambda request, index: written)
    (critique,) = critic.critiques({}, [record()], [0], SAMPLING, KEY)["r"]
    assert critique.scores is None and critique.failure == failure
    assert critique.finish_reason == ("stop" if isinstance(written, str) else "length")


def test_a_truncated_critique_keeps_its_last_token():
    critic, _ = make_critic(lambda request, index: (box(1, 2, 3), "length"))
    (critique,) = critic.critiques({}, [record()], [0], SAMPLING, KEY)["r"]
    assert critique.text == box(1, 2, 3)
    assert sorted(critique.scores or ()) == [1.0, 2.0, 3.0]


def test_reference_and_principles_reach_the_prompt():
    critic, stub = make_critic()
    critic.critiques(
        {}, [record(reference=" fay", principles=(" style", " tone"))], [0], SAMPLING, KEY
    )
    text = TOKENIZER.decode(stub.requests[0].prompt)
    assert " fay" in text and " style" in text and " tone" in text


def test_the_key_reaches_the_sampler_and_progress_counts():
    critic, stub = make_critic()
    counted = []
    critic.critiques({}, [record()], [4, 2], SAMPLING, KEY, progress=counted.append)
    assert sum(counted) == 2
    assert stub.key is KEY


def test_chosen_indices_keep_their_order():
    critic, _ = make_critic(order="random")
    whole = critic.critiques({}, [record()], range(6), SAMPLING, KEY)["r"]
    some = critic.critiques({}, [record()], [5, 2], SAMPLING, KEY)["r"]
    assert [(c.sample, c.order) for c in some] == [(5, whole[5].order), (2, whole[2].order)]


def test_duplicate_ids_are_refused():
    critic, _ = make_critic()
    with pytest.raises(ValueError, match="duplicate ids"):
        critic.critiques({}, [record(), record()], [0], SAMPLING, KEY)


def test_chunks():
    assert [len(part) for part in chunks([record(str(i)) for i in range(7)], 3)] == [3, 3, 1]


def test_adaptive_k_leaves_out_what_would_not_change_a_verdict():
    """The clear records stop early; the one whose critiques disagree gets all its samples."""

    def write(request: Request, index: int) -> str:
        if request.example_id == "even" and (index // 2) % 2:
            return box(*[1 + WORDS.index(word) for word in shown(request)])  # the other way round
        return score_by_name(request, index)

    records = [record("clear"), record("single", 1), record("even", 2)]
    critic, stub = make_critic(write)
    done: list[int] = []
    found = critic.critiques(
        None, records, range(16), SAMPLING, KEY, adaptive=AdaptiveK(0.05, 3), progress=done.append
    )  # fmt: skip
    assert stub.together == 3
    # Each three samples in a row are requests of their own: all orders come in turn.
    assert [r.samples for r in stub.requests if r.example_id == "even"][:4] == [
        (0, 2), (1,), (3, 5), (4,),
    ]  # fmt: skip
    assert len(found["clear"]) < 8 and len(found["even"]) == 16
    assert sum(done) == 3 * 16
    full = critic.critiques(None, records, range(16), SAMPLING, KEY)
    for name, critiques in found.items():
        by_index = {c.sample: c for c in full[name]}
        assert all(by_index[c.sample].scores == c.scores for c in critiques)


@pytest.mark.parametrize(("threshold", "stops"), [(None, True), (0.8, True), (1.0, False)])
def test_adaptive_k_decides_single_responses_against_the_threshold(threshold, stops):
    """Samples of 1 are above 0.5 and 0.8, and never above 1."""
    critic, _ = make_critic(lambda request, index: box(1))
    rule = AdaptiveK(0.05, 3, threshold=threshold)
    records = [record("single", 1)]
    found = critic.critiques(None, records, range(32), SAMPLING, KEY, adaptive=rule)
    assert (len(found["single"]) < 32) == stops


def test_adaptive_k_of_an_index_counts_ones_and_noughts(tmp_path):
    own = tmp_path / "index.jinja"
    header = "low=1 high=10 reads=scores", "low=1 high=n reads=index"
    own.write_text(Template.load("compact").source.replace(*header))
    stub = StubSampler(lambda request, index: box(1 + shown(request).index(WORDS[0])))
    templates = TemplateConfig(str(own), "compact_single", "compact_meta")
    critic = Critic(stub, Prompts(TOKENIZER, templates))  # pyright: ignore[reportArgumentType]
    found = critic.critiques(
        None, [record("r", 2)], range(32), SAMPLING, KEY, adaptive=AdaptiveK(0.05, 3)
    )
    assert len(found["r"]) < 16
