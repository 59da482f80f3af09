"""Examples hold the prompts that the sampler saw, and the completions that it should write."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from grm_jax.critique import Template, render
from grm_jax.critique.template_set import TemplateConfig
from grm_jax.data.examples import meta_example, reply_example, trajectory_example
from grm_jax.data.preferences import Preference
from grm_jax.data.synthetic_files import build_tokenizer
from grm_jax.data.trajectories import Instruction, parse_trajectory, to_trajectory
from grm_jax.judge.critiques import Rollout
from grm_jax.judge.prompts import Prompts

TEMPLATES = TemplateConfig("compact", "compact_single", "compact_meta")
TOKENIZER = build_tokenizer()
NOTHING = np.zeros(0)
TURNS = ({"role": "user", "content": " sum 1 2"},)
CONVERSATION = (*TURNS, {"role": "assistant", "content": " 3"}, {"role": "user", "content": " cat"})
RECORDS = {
    "pair": Preference("a", TURNS, (" anna", " ben"), (1.0, 0.0)),
    "single": Preference("b", TURNS, (" anna",), (0.0,)),
    "conversation": Preference("c", CONVERSATION, (" anna", " ben", " dog"), (1.0, 0.0, 2.0)),
    "reference": Preference("d", TURNS, (" anna", " ben"), (1.0, 0.0), reference=" fay"),
    "principles": Preference("e", TURNS, (" anna", " ben"), (1.0, 0.0), principles=(" tone",)),
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("hinted", [False, True])
def test_the_trained_prompt_is_the_sampled_one_without_its_hint(name, hinted):
    """Also after a trip through a trajectory file."""
    record = RECORDS[name]
    prompts = Prompts(TOKENIZER, TEMPLATES, order="random")
    (order,) = prompts.orders(record, 1)
    text = "Specific Criteria: answer high"
    critique = Rollout(
        example_id=record.id,
        sample=0,
        order=order,
        scores=None,
        failure="no_box",
        finish_reason="stop",
        text=text,
        prompt=(),
        ids=NOTHING,
        logprobs=NOTHING,
    )
    row = to_trajectory(record, critique, False, kept=True, hinted=hinted)
    line = {k: v for k, v in dataclasses.asdict(row).items() if v is not None}
    again = parse_trajectory(json.loads(json.dumps(line)), "here:1")
    assert again == row
    example = trajectory_example(again, TOKENIZER, TEMPLATES)
    assert example.prompt == prompts.ids(record, order)
    assert example.completion == (*TOKENIZER.encode(text), TOKENIZER.eos_id)


def test_instructions_learn_the_reply_alone():
    turns = (*TURNS, {"role": "assistant", "content": " 3 cm"})
    example = trajectory_example(Instruction(turns), TOKENIZER, TEMPLATES)
    whole = TOKENIZER.chat(turns, generation_prompt=False)
    assert [*example.prompt, *example.completion] == whole
    assert example.completion == (*TOKENIZER.encode(" 3 cm"), TOKENIZER.eos_id)


def test_the_meta_rm_reads_the_critique_as_the_reply():
    template = Template.load("compact_meta")
    example = meta_example(" sum 1 2", (" anna",), " answer 3", TOKENIZER, template, 1.0)
    assert TOKENIZER.decode(example.prompt) == " sum 1 2 [A] anna"
    assert TOKENIZER.decode(example.completion) == " answer 3"
    assert example.label == 1.0


def test_the_meta_rm_reads_what_the_judge_was_shown():
    template = Template.load("compact_meta")
    plain = meta_example(" sum 1 2", (" anna",), " answer 3", TOKENIZER, template)
    more = {"reference": " 3", "principles": [" cat", " dog"]}
    example = meta_example(" sum 1 2", (" anna",), " answer 3", TOKENIZER, template, **more)
    own = render(template, " sum 1 2", (" anna",), **more)
    assert example.prompt == tuple(TOKENIZER.chat(own)) != plain.prompt
    for text in (" reference 3", " principle cat", " principle dog"):
        assert text in own[0]["content"]
    nothing = {"reference": None, "principles": None}
    again = meta_example(" sum 1 2", (" anna",), " answer 3", TOKENIZER, template, **nothing)
    assert again == plain


def test_the_baseline_reads_one_response_as_the_reply():
    for query in (" sum 1 2", TURNS):
        example = reply_example(query, " anna", TOKENIZER)
        assert TOKENIZER.decode(example.prompt) == " sum 1 2"
        assert example.completion == (*TOKENIZER.encode(" anna"), TOKENIZER.eos_id)
    assert " cat" in TOKENIZER.decode(reply_example(CONVERSATION, " dog", TOKENIZER).prompt)
