"""Adapters against a server with the fake session, called as each trainer calls them."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import math
import pickle
from types import SimpleNamespace

import pytest
from fakes import FakeSession

from grm_jax.errors import UserError
from grm_jax.serving.adapters import nemo_gym, openrlhf, slime, verl
from grm_jax.serving.adapters.trl import trl_reward, trl_reward_async
from grm_jax.serving.adapters.verifiers import verifiers_reward
from grm_jax.serving.client import JudgeClient, JudgeRefused, JudgeUnavailable


@pytest.fixture
def session(shared) -> FakeSession:
    shared[0].requests.clear()
    return shared[0]


@pytest.fixture
def url(session, shared) -> str:
    return str(shared[1].base_url)


def messages(text: str, role: str = "assistant") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def judged(session: FakeSession) -> list[tuple[str, ...]]:
    return sorted(request.record.responses for request in session.requests)


# TRL


def test_trl_judges_each_prompts_completions_with_one_request(session, url):
    reward = trl_reward(url, k=1)
    found = reward(
        prompts=["p", "q", "p", "q", "p"],
        completions=["score=2", "score=3", "score=9", "score=4", "score=5"],
        completion_ids=[[1]] * 5,
        trainer_state=object(),
    )
    assert found == [2, 3, 9, 4, 5]
    assert judged(session) == [("score=2", "score=9", "score=5"), ("score=3", "score=4")]
    assert session.requests[0].options.k == 1


def test_trl_conversations_and_several_messages(session, url):
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    tools = [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "name": "f", "content": "4 degrees"},
        {"role": "assistant", "content": "It is 4. score=8"},
    ]
    found = trl_reward(url, k=1)(prompts=[prompt, prompt], completions=[tools, messages("score=3")])
    assert found == [8, 3]
    (asked,) = session.requests
    assert [turn["role"] for turn in asked.record.turns] == ["system", "user"]
    assert "4 degrees" in asked.record.responses[0] and "[tool call] f" in asked.record.responses[0]


def test_trl_alone_on_the_same_scale(session, url):
    assert trl_reward(url, k=1, group=False)(prompts=["p", "p"], completions=["score=2"] * 2) == [
        2, 2,
    ]  # fmt: skip
    assert all(request.options.rating for request in session.requests)
    assert judged(session)[0] == ("score=2",)


def test_trl_rank_reference_and_options(session, url):
    reward = trl_reward(url, k=1, reward="rank", reference="answer", criteria="Be right.", seed=5)
    found = reward(prompts=["p"] * 2, completions=["score=2", "score=9"], answer=["x", "x"])
    assert found == [0, 1]
    record = session.requests[0].record
    assert (record.reference, record.principles) == ("x", ("Be right.",))
    assert session.requests[0].options.seed == 5
    with pytest.raises(UserError, match="no such column"):
        reward(prompts=["p"], completions=["a"], other=["x"])


def test_trl_gets_none_for_a_failure_and_hears_of_it_once(session, url, caplog):
    reward, shares = trl_reward(url, k=1), []
    asked = {
        "prompts": ["p", "p", "q"],
        "completions": ["unreadable", "b", "score=4"],
        "log_metric": lambda name, value: shares.append((name, value)),
    }
    with caplog.at_level(logging.WARNING):
        assert reward(**asked) == [None, None, 4]
        assert reward(**asked) == [None, None, 4]
    said = [r for r in caplog.records if "None" in r.message]
    assert len(said) == 1 and "as 0 beside another reward function" in said[0].message
    assert shares == [("grm/failed", pytest.approx(2 / 3))] * 2


def test_trl_goes_on_where_a_request_is_refused_and_stops_where_all_would_be(url):
    assert trl_reward(url, k=1)(prompts=["too long", "p"], completions=["a", "score=2"]) == [
        None,
        2,
    ]
    with pytest.raises(JudgeRefused):
        trl_reward(f"{url}/nowhere")(prompts=["p"], completions=["a"])
    with pytest.raises(JudgeRefused, match="k: 500; this server takes at most"):
        trl_reward(url, k=500)(prompts=["p", "q"], completions=["a", "b"])


def test_trl_refuses_options_that_do_not_exist_when_it_is_made(url):
    for wrong in ({"reward": "best"}, {"colour": "red"}, {"k": 0}, {"method": "coin"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            trl_reward(url, **wrong)


def test_trl_goes_on_with_refusals_once_it_has_worked(url):
    reward = trl_reward(url, k=1)
    assert reward(prompts=["p"], completions=["score=2"]) == [2]
    assert reward(prompts=["too long"], completions=["a"]) == [None]


def test_trl_a_server_that_is_not_there_is_none(caplog):
    reward = trl_reward("http://127.0.0.1:9", timeout=0.3)
    assert reward(prompts=["p"], completions=["a"]) == [None]
    assert "within 0.3 s" in caplog.text


def test_trl_async_is_a_coroutine_function_and_both_can_be_pickled(session, url):
    reward = trl_reward_async(url, k=1)
    assert inspect.iscoroutinefunction(reward) and reward.__name__ == "grm_reward_async"
    asked = {"prompts": ["p", "q", "p"], "completions": ["score=2", "score=3", "score=9"]}
    assert asyncio.run(reward(**asked)) == [2, 3, 9]
    again = pickle.loads(pickle.dumps(reward))
    assert asyncio.run(again(**asked)) == [2, 3, 9]
    plain = pickle.loads(pickle.dumps(trl_reward(url, k=1)))
    assert plain(**asked) == [2, 3, 9] and plain.__name__ == "grm_reward"


def test_trl_with_a_judge_in_this_process():
    class Judge:
        asked = []  # noqa: RUF012

        def score(self, query, responses, **options):
            self.asked.append((query, list(responses), options))
            row = {"failure": None, "scores": [len(text) for text in responses]}
            return SimpleNamespace(to_json=lambda critiques: row)

    reward = trl_reward(Judge(), k=3)
    assert reward(prompts=["p", "p"], completions=["a", "bb"]) == [1, 2]
    assert Judge.asked == [("p", ["a", "bb"], {"rating": True, "k": 3})]
    assert asyncio.run(trl_reward_async(Judge())(prompts=["p"], completions=["abc"])) == [3]


# verl


def verl_score(url, solution, question="q", **settings):
    return verl.compute_score(
        data_source="s", solution_str=solution, ground_truth="4",
        extra_info={"question": question}, url=url, k=1, **settings,
    )  # fmt: skip


def test_verl_rollouts_meet_on_the_server(session, url):
    assert inspect.iscoroutinefunction(verl.compute_score)

    async def score():
        return await asyncio.gather(
            *(verl_score(url, text, group_size=3, window=30.0)
              for text in ("score=2", "score=9", "score=5"))
        )  # fmt: skip

    rows = asyncio.run(score())
    assert [row["score"] for row in rows] == [2, 9, 5]
    assert judged(session) == [("score=2", "score=5", "score=9")]
    assert all(row["grm_group_size"] == 3 and row["grm_failed"] == 0 for row in rows)


@pytest.mark.parametrize(("policy", "score"), [(0.0, 0), ("-1.5", -1.5)])
def test_verl_a_number_that_the_user_chose(url, policy, score):
    good = asyncio.run(verl_score(url, "score=4", group_size=1, on_failure=policy))
    bad = asyncio.run(verl_score(url, "unreadable", group_size=1, on_failure=policy))
    assert (good["score"], bad["score"], bad["grm_failed"]) == (4, score, 1)
    assert good.keys() == bad.keys() and math.isnan(bad["grm_rank"])


def test_verl_raises_unless_told_otherwise(url):
    with pytest.raises(JudgeUnavailable, match="no_box"):
        asyncio.run(verl_score(url, "unreadable", group_size=1))


def test_verl_group_mean_is_of_scores_alone(url):
    async def score(text):
        row = await verl_score(url, text, "mean of", group_size=1, on_failure="group_mean")
        return row["score"]

    with pytest.raises(JudgeUnavailable):
        asyncio.run(score("unreadable"))  # nothing to take the mean of
    assert asyncio.run(score("score=4")) == 4
    assert asyncio.run(score("unreadable 1")) == 4
    assert asyncio.run(score("score=10")) == 10
    assert asyncio.run(score("unreadable 2")) == 7  # what stood in does not count


def test_verl_without_a_prompt_or_a_server(url, monkeypatch):
    monkeypatch.delenv(verl.URL, raising=False)
    with pytest.raises(UserError, match="extra_info has no 'question'"):
        asyncio.run(verl.compute_score("s", "a", "b", {}, url=url))
    with pytest.raises(UserError, match="no url"):
        asyncio.run(verl_score(None, "a"))
    with pytest.raises(UserError, match="on_failure"):
        asyncio.run(verl_score(url, "a", on_failure="ignore"))


def test_verl_a_mistake_never_becomes_the_reward_of_a_run(url):
    """A number for failures is no number for options that every request would be refused for."""
    for options, message in (({"kk": 4}, "unknown setting kk"), ({"seed": -1}, "seed is -1"),
                             ({"method": "best"}, "method is")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            asyncio.run(verl_score(url, "score=4", on_failure=0.0, **options))
    with pytest.raises(JudgeRefused):  # the server writes fewer tokens, and no verdict came before
        asyncio.run(verl_score(url, "score=4", group_size=1, on_failure=0.0, max_new_tokens=10**6))


def test_verl_manager_reads_the_prompt_from_the_batch(session, url):
    torch = pytest.importorskip("torch")

    class Row(SimpleNamespace):
        """As much of a DataProto as a reward manager of verl reads."""

        def __getitem__(self, index):
            return self

    tokenizer = SimpleNamespace(
        decode=lambda ids, skip_special_tokens: f"{len(ids)} tokens score=6"
    )
    row = Row(
        batch={
            "responses": torch.tensor([5, 6, 7, 0, 0]),
            "attention_mask": torch.tensor([0, 1, 1, 1, 1, 1, 0, 0]),
        },
        non_tensor_batch={
            "raw_prompt": messages("2+2?", "user"),
            "reward_model": {"ground_truth": "4"},
            "data_source": "s",
        },
    )
    kwargs = {"url": url, "k": 1, "group_size": 1, "reference": True}
    config = SimpleNamespace(reward={"custom_reward_function": {"reward_kwargs": kwargs}})
    manager = verl.GRMRewardManager(
        config=config, tokenizer=tokenizer, compute_score=None, reward_router_address=None,
        reward_model_tokenizer=None,
    )  # fmt: skip
    found = asyncio.run(manager.run_single(row))
    assert found["reward_score"] == 6 and found["reward_extra_info"]["score"] == 6
    record = session.requests[0].record
    assert record.responses == ("3 tokens score=6",) and record.reference == "4"


# OpenRLHF, slime, verifiers, NeMo Gym


def test_openrlhfs_python_file(session, url):
    torch = pytest.importorskip("torch")
    reward = openrlhf.openrlhf_reward(url, k=1, group_size=1)
    prompt = "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    found = reward([f"{prompt}score=7<end_of_turn>"], [prompt], ["label"])
    assert torch.equal(found["rewards"], torch.tensor([7.0]))
    assert 0 <= found["scores"].item() <= 1
    assert all(value.numel() == 1 for value in found["extra_logs"].values())
    short = openrlhf.openrlhf_reward(url, k=1, group_size=1, timeout=0.1)
    with pytest.raises(JudgeUnavailable):
        short([f"{prompt}unreadable"], [prompt], [None])


def sample(response, prompt="q", label=None):
    return SimpleNamespace(prompt=prompt, response=response, label=label)


def test_slimes_groups(session, url):
    reward = slime.slime_reward(url, k=1)
    group = [sample("score=2"), sample("score=9<|im_end|>"), sample("score=5")]
    assert asyncio.run(reward(None, group)) == [2, 9, 5]
    assert judged(session) == [("score=2", "score=9", "score=5")]
    assert asyncio.run(reward(None, sample("score=3", messages("q", "user")))) == 3


def test_slimes_failures(url):
    with pytest.raises(JudgeUnavailable):
        asyncio.run(slime.slime_reward(url, k=1)(None, [sample("unreadable"), sample("b")]))
    chosen = slime.slime_reward(url, k=1, on_failure=0.5)
    assert asyncio.run(chosen(None, [sample("unreadable"), sample("b")])) == [0.5, 0.5]


def test_slime_by_its_options_alone(session, url):
    args = SimpleNamespace(rm_url=f"{url}/rm?k=2&criteria=Be%20right.")
    assert asyncio.run(slime.grm_reward(args, [sample("score=4")])) == [4]
    assert session.requests[0].options.k == 2
    assert session.requests[0].record.principles == ("Be right.",)
    with pytest.raises(UserError, match="--rm-url"):
        asyncio.run(slime.grm_reward(SimpleNamespace(rm_url=None), []))


def test_verifiers_group_reward(session, url):
    reward = verifiers_reward(url, k=1)
    assert {"prompts", "completions"} <= set(inspect.signature(reward).parameters)
    completions = [messages("score=2"), messages("score=9")]
    prompts = [messages("q", "user")] * 2
    assert asyncio.run(reward(prompts=prompts, completions=completions)) == [2, 9]
    with pytest.raises(JudgeUnavailable):
        asyncio.run(reward(prompts=prompts, completions=[messages("unreadable"), messages("b")]))


def test_verifiers_judge_plugin(session, url, tmp_path, monkeypatch):
    vf = pytest.importorskip("verifiers.v1", reason="verifiers is not installed")
    graph = importlib.import_module("verifiers.v1.graph")
    types = importlib.import_module("verifiers.v1.types")
    loaders = importlib.import_module("verifiers.v1.utils.loaders")

    (tmp_path / "grm_judge_plugin.py").write_text(
        "from grm_jax.serving.adapters.verifiers import GRMJudge\n__all__ = ['GRMJudge']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = loaders.judge_config_type("grm_judge_plugin")(
        id="grm_judge_plugin", base_url=url, k=1, group_size=1
    )

    def score(reply: str) -> float:
        data = vf.TaskData(idx=0, prompt="Capital of France?")
        trace = vf.Trace(
            agent=vf.AgentInfo(config=vf.AgentConfig()),
            task=vf.TraceTask(type="Task", data=data),
            nodes=[
                graph.MessageNode(
                    parent=None, message=types.UserMessage(content="Q"), sampled=False
                ),
                graph.MessageNode(
                    parent=0, message=types.AssistantMessage(content=reply), sampled=True
                ),
            ],
        )
        return asyncio.run(loaders.load_judge(config).score(data, trace))

    assert score("It is Paris. score=9") == 9
    assert session.requests[0].record.turns[0]["content"] == "Capital of France?"
    with pytest.raises(JudgeRefused, match="no_box"):
        score("unreadable")


def test_nemo_gyms_rows(url):
    row = {
        "responses_create_params": {"input": messages("q", "user")},
        "response": {
            "output": [
                {"type": "message", "content": [{"type": "output_text", "text": "score=10"}]}
            ]
        },
        "_ng_task_index": 4,
    }

    async def verify(where):
        return await nemo_gym.verify_row(JudgeClient(where, timeout=20), row)

    found = asyncio.run(verify(url))
    assert (found["reward"], found["_ng_task_index"]) == (5.0, 4)

    async def unreachable():
        return await nemo_gym.verify_row(JudgeClient("http://127.0.0.1:9", timeout=0.2), row)

    lost = asyncio.run(unreachable())
    assert (lost["reward"], lost["_ng_failure_class"]) == (0.0, "judge_failed")
    assert lost["response"] == row["response"] and "JudgeUnavailable" in str(lost)
