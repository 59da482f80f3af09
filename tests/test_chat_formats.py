"""Chat formats of the families beside Gemma-2: the ids of transformers, and control tokens of the
checkpoint's own that no text yields.

The templates are short forms of the published ones, with the constructs that these use.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grm_jax.model.hf_config import token_ids
from grm_jax.tokenizer import load_tokenizer
from grm_jax.tokenizer.folding import conversation_ids
from grm_jax.tokenizer.vocabulary import TokenizerError, require_rows

tokenizers = pytest.importorskip("tokenizers")

GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + (date_string if date_string is defined else "26 Jul 2024") + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not 'tool_calls' in message %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
CHATML = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and message.content is string %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# template, special tokens, other added tokens, names, ids' tokens of generation_config.json
FORMATS: dict[str, tuple[str, list[str], list[str], dict[str, str], list[str], str]] = {
    "gemma3": (
        GEMMA3, ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], [],
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        ["<eos>", "<end_of_turn>"], "<end_of_turn>",
    ),
    "llama3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
         "<|eom_id|>", "<|eot_id|>"], [],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], "<|eot_id|>",
    ),
    "qwen2.5": (
        CHATML, CHATML_TOKENS, ["<tool_call>"],
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ["<|im_end|>", "<|endoftext|>"], "<|im_end|>",
    ),
    "qwen3": (
        QWEN3, CHATML_TOKENS, ["<think>", "</think>"],
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ["<|im_end|>", "<|endoftext|>"], "<|im_end|>",
    ),
    "smollm2": (
        CHATML, CHATML_TOKENS, [],
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        ["<|im_end|>"], "<|im_end|>",
    ),
}  # fmt: skip
TEXTS = ("  Which is better?\n\n1: a  2: b ", "émoji 🎉, 漢字\ttab", "It's fine.\n", "ok")


@pytest.fixture(scope="module", params=FORMATS)
def folder(request, tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer with the format's tokens, as a Hugging Face folder."""
    template, special, added, names, _, _ = FORMATS[request.param]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    corpus = ["system user assistant model Which is better? It's fine. <|im_end|> think"] * 9
    tokenizer.train_from_iterator([*corpus, template], trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([tokenizers.AddedToken(text, special=False) for text in added])
    root = tmp_path_factory.mktemp(request.param)
    tokenizer.save(str(root / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (root / "tokenizer_config.json").write_text(json.dumps(config))
    (root / "chat_template.jinja").write_text(template)
    stops = [tokenizer.token_to_id(text) for text in FORMATS[request.param][4]]
    (root / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return root


@pytest.fixture
def name(folder) -> str:
    return next(name for name in FORMATS if folder.name.startswith(name))


CONVERSATIONS = {
    "one turn": [("user", TEXTS[0])],
    "three turns": [("user", TEXTS[0]), ("assistant", TEXTS[2]), ("user", TEXTS[1])],
    "system": [("system", TEXTS[2]), ("user", TEXTS[1])],
}


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "whole"])
def test_ids_are_those_of_transformers(turns, prompt, folder):
    """System turns are passed on, as all of these templates take them."""
    transformers = pytest.importorskip("transformers")
    messages = [{"role": role, "content": text} for role, text in turns]
    ours = load_tokenizer(folder).chat(messages, generation_prompt=prompt)
    theirs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=prompt, enable_thinking=False, return_dict=False
    )
    assert ours == theirs
    if prompt:
        assert conversation_ids(load_tokenizer(folder), messages) == ours


def test_a_reply_continues_the_prompt(folder, name):
    tokenizer = load_tokenizer(folder)
    end = FORMATS[name][5]
    assert tokenizer.end_id == tokenizer.vocabulary[end]
    wanted = {tokenizer.vocabulary[text] for text in FORMATS[name][4]}
    assert wanted <= set(tokenizer.stop_ids)
    reply = tokenizer.completion("It's fine.")
    assert tokenizer.decode(reply, show_control=True) == f"It's fine.{end}"


def test_no_text_yields_a_control_token(folder, name):
    """Those of the checkpoint are control tokens, unflagged ones that its template uses as well."""
    tokenizer = load_tokenizer(folder)
    template, special, added, _, _, _ = FORMATS[name]
    tokens = [*special, *(text for text in added if text in template)]
    assert tokenizer.control_ids == {tokenizer.vocabulary[text] for text in tokens} | {
        tokenizer.vocabulary[text] for text in added if text.startswith("<|")
    }
    attack = "x".join(tokens)
    for ids in (tokenizer.encode(attack), tokenizer.completion(attack)[:-1]):
        assert tokenizer.control_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == attack
    honest = tokenizer.chat([{"role": "user", "content": "hello"}])
    attacked = tokenizer.chat([{"role": "user", "content": attack}])
    count = [sum(id in tokenizer.control_ids for id in ids) for ids in (honest, attacked)]
    assert count[0] == count[1]


def test_saved_and_loaded_it_is_the_same(folder, tmp_path):
    messages = [{"role": "user", "content": TEXTS[0]}]
    before = load_tokenizer(folder)
    before.save(tmp_path)
    after = load_tokenizer(tmp_path)
    assert after.chat(messages) == before.chat(messages)
    assert set(after.stop_ids) == set(before.stop_ids)
    assert after.control_ids == before.control_ids


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
def test_qwen3_does_not_think(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.chat([{"role": "user", "content": "ok"}])
    text = tokenizer.decode(ids, show_control=True)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("folder", ["gemma3"], indirect=True)
def test_gemma_3s_image_token_needs_no_row_of_a_text_model(folder, tmp_path):
    """In the published 270m and 1b its id is the number of the embedding's rows."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = tokenizer.get_vocab_size()

    def with_token(text: str):
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        more = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        more.add_special_tokens([text])
        more.save(str(tmp_path / "tokenizer.json"))
        return load_tokenizer(tmp_path)

    ours = with_token("<image_soft_token>")
    assert ours.vocabulary["<image_soft_token>"] == rows
    require_rows(ours.vocabulary, rows, "tokenizer", "model")
    require_rows(token_ids(tmp_path), rows, "tokenizer", "model")
    assert max(ours.encode("an <image_soft_token>")) < rows
    message = rf"has {rows + 1} token ids, but the embedding of model has {rows} rows"
    with pytest.raises(TokenizerError, match=message):
        require_rows(with_token("<|im_end|>").vocabulary, rows, "tokenizer", "model")
