"""Policies' markups: each known template gives back the conversation that it was made from."""

from __future__ import annotations

import pytest

from grm_jax.data.rows import DataError
from grm_jax.serving.protocols.policy_text import (
    read_conversation,
    read_prompt,
    read_response,
    split,
)

# (prompt of "Be brief." / "Hi" / "Hello." / "2+2?", what ends a reply), as the templates write them
TEMPLATES = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_end|>\n",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "gemma4": (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n"
        "<|turn>model\nHello.<turn|>\n<|turn>user\n2+2?<turn|>\n<|turn>model\n",
        "<turn|>",
    ),
    "deepseek": (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>Hello.<｜end▁of▁sentence｜>"
        "<｜User｜>2+2?<｜Assistant｜>",
        "<｜end▁of▁sentence｜>",
    ),
    "gpt-oss": (
        "<|start|>system<|message|>Be brief.<|end|><|start|>user<|message|>Hi<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hello.<|end|>"
        "<|start|>user<|message|>2+2?<|end|><|start|>assistant",
        "<|return|>",
    ),
    "phi": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello.<|end|>\n"
        "<|user|>\n2+2?<|end|>\n<|assistant|>\n",
        "<|end|><|endoftext|>",
    ),
    "llama2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. </s><s>[INST] 2+2? [/INST]",
        " </s>",
    ),
}
TURNS = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "2+2?")]


def pairs(turns):
    return [(turn["role"], turn["content"]) for turn in turns]


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_read_back(name):
    prompt, end = TEMPLATES[name]
    turns, begun = read_prompt(prompt)
    assert pairs(turns) == TURNS and begun == ""
    assert read_response(split(prompt + "4" + end, prompt)).strip() == "4"


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "llama2"])
def test_whole_conversations_are_read_back(name):
    prompt, end = TEMPLATES[name]
    tail = "<|channel|>final<|message|>4" if name == "gpt-oss" else "4"
    found = read_conversation(prompt + tail + end)
    assert found is not None
    assert (pairs(found[0]), found[1]) == (TURNS, "4")


def test_gemma_2_has_no_system_turn():
    prompt = "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert pairs(read_prompt(prompt)[0]) == [("user", "Be brief.\n\nHi")]


def test_what_a_template_begins_for_the_assistant_belongs_to_the_response():
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    turns, begun = read_prompt(prompt)
    assert pairs(turns) == [("user", "Hi")] and begun == "<think>\n"


def test_a_text_of_no_known_markup_is_the_users():
    for text in ("What is 2+2?", "a < b > c |x|", "### Instruction:\nSay hi\n### Response:\n"):
        assert pairs(read_prompt(text)[0]) == [("user", text)]


def test_the_users_words_stay_as_they_are():
    text = "  keep\n\tmy <b>spaces</b> and | pipes |>  \n"
    prompt = f"<|im_start|>user\nFirst{text}last<|im_end|>\n<|im_start|>assistant\n"
    assert read_prompt(prompt)[0][0]["content"] == f"First{text}last"
    assert read_response("  code:\n\n    x = 1\n<|im_end|>") == "  code:\n\n    x = 1"
    assert read_response("no end </s> in the middle stays") == "no end </s> in the middle stays"


def test_tools_results_are_kept():
    prompt = (
        "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\ncall<|im_end|>\n"
        "<|im_start|>tool\n4 degrees<|im_end|>\n<|im_start|>assistant\n"
    )
    assert pairs(read_prompt(prompt)[0])[-1] == ("tool", "4 degrees")


def test_a_query_that_decodes_otherwise_than_its_prompt():
    prompt = "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert split("<bos>" + prompt + "ok", prompt) == "ok"
    assert split(prompt.removeprefix("<bos>") + "ok", prompt) == "ok"


def test_a_prompt_that_was_cut_at_its_front():
    prompt = "x" * 500 + " the question is: what is the answer to all of these many questions? ->"
    assert split(prompt[300:] + "42", prompt) == "42"
    # The end of the prompt, once more in the response, is no second end.
    assert split(prompt[300:] + "42" + prompt[-80:], prompt) == "42" + prompt[-80:]


def test_a_cut_prompt_whose_end_stands_in_it_twice():
    again = "say the same thing again, in exactly these words, and then once more: "
    prompt = f"{'x' * 300}{again} first. {again}"
    assert split(prompt[200:] + "42", prompt) == "42"


@pytest.mark.parametrize("query", ["", "Hello", "something else entirely" * 20])
def test_a_query_without_its_prompt_is_refused(query):
    with pytest.raises(DataError, match="does not begin with its prompt"):
        split(query, "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n" * 4)


@pytest.mark.parametrize("prompt", ["<|im_start|>system\nBe brief.<|im_end|>\n"])
def test_a_prompt_without_a_users_turn_is_refused(prompt):
    with pytest.raises(DataError, match="no user's turn"):
        read_prompt(prompt)


@pytest.mark.parametrize("text", ["just a text", "<|im_start|>user\nHi<|im_end|>\n", ""])
def test_what_is_no_whole_conversation(text):
    assert read_conversation(text) is None


def test_reading_is_linear():
    text = "<|im_start|>user\n" + "<|im_start|> [INST] </s> " * 20_000
    read_prompt(text)
    read_response(" </s" * 50_000)
    read_conversation(text)
