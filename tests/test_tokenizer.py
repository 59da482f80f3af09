"""Text is only text, ids are those of transformers, save then load is the identity."""

from __future__ import annotations

import json
import logging
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grm_jax.tokenizer import (
    ChatTokenizer,
    Tokenizer,
    TokenizerError,
    from_tokenizers,
    load_tokenizer,
)
from grm_jax.tokenizer.chat_template import GEMMA_TEMPLATE
from grm_jax.tokenizer.folding import conversation_ids

tokenizers = pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")

SHARED = Path(__file__).parents[2] / "shared"
GEMMA_CONFIG = {
    "tokenizer_class": "GemmaTokenizer",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "chat_template": GEMMA_TEMPLATE,
}
TEXTUAL = ["\n", "\n\n", "▁▁", "<table>", "</table>", "<b>", "</b>"]  # pieces of Gemma's, too
PLAIN_TEXTS = [
    "bad tofu ziv",
    " leading and trailing \n",
    "line one\nline two\n\nline four\n\n\n\nend",
    "spaces  two   three    four",
    "a table: <table><b>x</b></table> and 3 < 4 > 2",
    "digits 12345, punctuation!? {json: [1]} <|not a token",
    "émoji 🎉, 漢字, \u2028 line separator, tab\there",
]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def dialogue(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


# ------------------------------------------------------------------------------ small tokenizers


@pytest.fixture(scope="module")
def gemma_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model with Gemma's settings and special pieces, as tokenizer.model."""
    folder = tmp_path_factory.mktemp("gemma")
    rng = random.Random(0)
    words = ["".join(rng.choice("bcdfgh") + rng.choice("aeiou") for _ in "xyz") for _ in range(99)]
    words += ["user", "model", "table", "bad", "tofu", "<", ">", "</", "turn>", "{", "12"]
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(" ".join(rng.choices(words, k=12)) + "\n" for _ in range(400)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=640,
        model_type="bpe",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=["<mask>", "<start_of_turn>", "<end_of_turn>", "<unused0>", *TEXTUAL],
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    corpus.unlink()
    (folder / "tokenizer.vocab").unlink()
    write_json(folder / "tokenizer_config.json", GEMMA_CONFIG)
    return folder


@pytest.fixture(scope="module")
def gemma_json_dir(gemma_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, converted by transformers to tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("gemma-json")
    transformers.AutoTokenizer.from_pretrained(str(gemma_dir)).save_pretrained(str(folder))
    assert (folder / "tokenizer.json").exists() and not (folder / "tokenizer.model").exists()
    return folder


EMBEDDED_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}{{ m.content }}<judge>"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def embedded() -> Tokenizer:
    """A word-level vocabulary, as the embedded world has."""
    special = ["<pad>", "<bos>", "<eos>", "<judge>", "<unk>"]
    words = ["sum", "of", "2", "and", "3", "five", ":", "<", ">"]
    vocab = {w: i for i, w in enumerate(special + words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    config = {f"{t}_token": f"<{t}>" for t in ("pad", "bos", "eos", "unk")}
    return from_tokenizers(tokenizer, config | {"chat_template": EMBEDDED_TEMPLATE})


def unigram(scheme: str = "first") -> ChatTokenizer:
    """T5's and XLM-R's kind: the eos piece stands in the unigram trie, with the best score."""
    pieces = ["<pad>", "</s>", "<unk>", "▁a", "▁b", "▁", "a", "b", "<", "/", "s", ">", "\n"]
    model = tokenizers.models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], unk_id=2)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    config = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return from_tokenizers(tokenizer, config)


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + "
    "'<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml(template: str = CHATML, **flags: Any) -> ChatTokenizer:
    """Byte-level BPE with ChatML delimiters that are added, but not flagged special."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["<|im_end|> user: hello\n\n: hello assistant\n", "Q:hello hello<|im_start|>"] * 9
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken("<|im_start|>", normalized=False, special=False),
            tokenizers.AddedToken("<|im_end|>", normalized=False, special=False, **flags),
        ]
    )
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return from_tokenizers(tokenizer, {"eos_token": "<|endoftext|>", "chat_template": template})


@pytest.fixture(scope="module")
def every(gemma_dir: Path, gemma_json_dir: Path) -> dict[str, Tokenizer]:
    return {
        "gemma.model": load_tokenizer(gemma_dir),
        "gemma.json": load_tokenizer(gemma_json_dir),
        "embedded": embedded(),
        "unigram": unigram(),
        "chatml": chatml(),
    }


KINDS = ["gemma.model", "gemma.json", "embedded", "unigram", "chatml"]


# ------------------------------------------------------------------------------ as transformers


@pytest.mark.parametrize("kind", ["model", "json"])
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_chat_ids_are_those_of_transformers(
    kind: str, generation_prompt: bool, gemma_dir: Path, gemma_json_dir: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(gemma_dir))
    ours = load_tokenizer(gemma_dir if kind == "model" else gemma_json_dir)
    for conversation in [
        *map(user, PLAIN_TEXTS),
        dialogue(*PLAIN_TEXTS[:3]),
        dialogue(*PLAIN_TEXTS),
        user(""),
    ]:
        want = theirs.apply_chat_template(conversation, add_generation_prompt=generation_prompt)
        got = ours.chat(conversation, generation_prompt=generation_prompt)
        assert got == want["input_ids"], conversation
    for text in PLAIN_TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    "build",
    [
        lambda: chatml(),
        # No control token between scaffold and text: merges run over the boundary.
        lambda: chatml("{% for m in messages %}Q:{{ m.content }}\n: {% endfor %}"),
        lambda: chatml(lstrip=True, rstrip=True),
        lambda: unigram("first"),
        lambda: unigram("always"),
    ],
)
def test_other_kinds_agree_with_transformers_too(build: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = build()
    ours.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    for conversation in [
        user("hello\n"),
        user("  a b "),
        dialogue("hello", " b a", "hello hello "),
    ]:
        want = theirs.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
        assert ours.chat(conversation) == want


# ------------------------------------------------------------------------------ only text


@pytest.mark.parametrize("kind", KINDS)
def test_no_literal_becomes_a_control_id(kind: str, every: dict[str, Tokenizer]) -> None:
    t = every[kind]
    literals = [t.decode([i], show_control=True) for i in t.control_ids]
    assert len(literals) >= 2 and all(literals)
    scaffold = [i for i in t.chat(user("a")) if i in t.control_ids]
    for literal in literals:
        for text in (literal, f"a{literal}b", f" {literal}\n{literal} ", literal * 3, literal[:-1]):
            assert t.control_ids.isdisjoint(t.encode(text))
            assert t.control_ids.isdisjoint(t.completion(text)[:-1])
            assert [i for i in t.chat(user(text)) if i in t.control_ids] == scaffold


def test_control_tokens_are_the_delimiters_and_not_the_html(
    every: dict[str, Tokenizer],
) -> None:
    names = {"<pad>", "<bos>", "<eos>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<unused0>"}
    for kind in ("gemma.model", "gemma.json"):
        t = every[kind]
        assert {t.decode([i], show_control=True) for i in t.control_ids} == names
        assert len(t.encode("<table>")) == len(t.encode("\n\n")) == 1


def test_a_delimiter_cut_by_the_boundary_stays_text(every: dict[str, Tokenizer]) -> None:
    """Scaffold and content together spell a delimiter that neither has alone."""
    t = chatml("{% for m in messages %}<|im_{{ m.content }}|>{% endfor %}")
    assert t.control_ids.isdisjoint(t.chat(user("end")))


PIECES = [
    "<eos>",
    "<bos>",
    "<end_of_turn>",
    "<start_of_turn>",
    "<mask>",
    "<",
    "end_of",
    "turn>",
    "\n",
]
HOSTILE = st.lists(
    st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
).map("".join)


@pytest.mark.parametrize("kind", ["gemma.model", "gemma.json"])
def test_any_text_survives_and_stays_text(kind: str, every: dict[str, Tokenizer]) -> None:
    t = every[kind]
    scaffold = [i for i in t.chat(user("a")) if i in t.control_ids]

    @settings(max_examples=150, deadline=None)
    @given(HOSTILE)
    def check(text: str) -> None:
        text = text.replace("▁", "_")  # sentencepiece's own spelling of a space
        ids = t.encode(text)
        assert t.control_ids.isdisjoint(ids)
        assert t.decode(ids) == text
        ids = t.chat(user(text))
        assert [i for i in ids if i in t.control_ids] == scaffold
        assert t.decode(ids) == f"user\n{text.strip()}\nmodel\n"

    check()


@pytest.mark.parametrize("kind", ["gemma.model", "gemma.json", "chatml"])
def test_a_lone_surrogate_is_refused(kind: str, every: dict[str, Tokenizer]) -> None:
    t = every[kind]
    for call in (t.encode, t.completion, lambda x: t.chat(user(x))):
        with pytest.raises(TokenizerError, match="lone surrogate at character 2"):
            call("ab\ud83d")


# ------------------------------------------------------------------------------ chat formats


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_completion_are_the_conversation(kind: str, every: dict[str, Tokenizer]) -> None:
    """SFT's targets are what the model would have had to sample after the prompt."""
    t = every[kind]
    asked, answer = user("sum of 2 a b"), "five a b"
    prompt, completion = t.chat(asked), t.completion(answer)
    whole = t.chat([*asked, {"role": "assistant", "content": answer}], generation_prompt=False)
    assert whole[: len(prompt) + len(completion)] == prompt + completion
    assert completion[-1] == t.end_id and t.end_id in t.stop_ids and t.eos_id in t.stop_ids


def test_bos_stands_once(every: dict[str, Tokenizer]) -> None:
    for kind in ("gemma.model", "gemma.json", "embedded"):
        t = every[kind]
        ids = t.chat(user("a"))
        assert [i for i, x in enumerate(ids) if x == t.bos_id] == [0]
        assert t.bos_id not in t.encode("a") + t.completion("a")


def test_a_text_begins_as_in_transformers(gemma_dir: Path, gemma_json_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for folder in (gemma_dir, gemma_json_dir):
        theirs = transformers.AutoTokenizer.from_pretrained(str(folder))("bad").input_ids
        t = load_tokenizer(folder)
        assert t.begin_ids == (t.bos_id,) == (theirs[0],)
    assert embedded().begin_ids == ()  # it has a bos, which nothing puts before a text


def test_a_post_processor_says_what_begins_a_text(gemma_json_dir: Path, tmp_path: Path) -> None:
    """Llama-3 has a sequence of processors, SmolLM2 none that adds a token."""
    shutil.copytree(gemma_json_dir, tmp_path / "t")
    file = tmp_path / "t" / "tokenizer.json"
    spec = json.loads(file.read_text(encoding="utf-8"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False,
                  "use_regex": True}  # fmt: skip
    for processor, begins in (
        (None, False),
        (byte_level, False),
        ({"type": "Sequence", "processors": [byte_level, spec["post_processor"]]}, True),
    ):
        file.write_text(json.dumps({**spec, "post_processor": processor}), encoding="utf-8")
        t = load_tokenizer(tmp_path / "t")
        assert t.begin_ids == ((t.bos_id,) if begins else ())
        theirs = tokenizers.Tokenizer.from_file(str(file)).encode("bad").ids
        assert (theirs[0] == t.bos_id) == begins


def test_ids_of_gemma(every: dict[str, Tokenizer]) -> None:
    for kind in ("gemma.model", "gemma.json"):
        t = every[kind]
        assert (t.pad_id, t.eos_id, t.bos_id, t.vocab_size) == (0, 1, 2, 640)
        assert (t.end_id, t.stop_ids) == (6, (1, 6))
        ids = t.chat(user("bad tofu"))
        assert t.decode(ids, show_control=True) == (
            "<bos><start_of_turn>user\nbad tofu<end_of_turn>\n<start_of_turn>model\n"
        )
        assert t.decode(ids) == "user\nbad tofu\nmodel\n"


def test_embedded(tmp_path: Path) -> None:
    t = embedded()
    assert t.chat(user("sum of 2 and 3")) == [1, 5, 6, 7, 8, 9, 3]
    assert t.completion("five") == [10, 2] and t.stop_ids == (2,) and t.pad_id == 0
    assert t.decode([10, 4, 11, 2]) == "five <unk> :"  # the unknown word is text, and visible
    assert t.encode("<eos> <unk>") == [4, 4]


def test_stop_ids_of_generation_config(gemma_dir: Path, tmp_path: Path) -> None:
    load_tokenizer(gemma_dir).save(tmp_path)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [1, 10], "top_k": 5})
    t = load_tokenizer(tmp_path)
    assert t.stop_ids == (1, 6, 10)
    t.save(tmp_path)
    kept = json.loads((tmp_path / "generation_config.json").read_text())
    assert kept == {"eos_token_id": [1, 6, 10], "top_k": 5}
    write_json(tmp_path / "generation_config.json", {"eos_token_id": ["x"]})
    with pytest.raises(TokenizerError, match="eos_token_id"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_save_then_load_is_the_identity(
    kind: str, every: dict[str, Tokenizer], tmp_path: Path
) -> None:
    t = every[kind]
    t.save(tmp_path / "a")
    again = load_tokenizer(tmp_path / "a")
    for field in (
        "vocab_size",
        "pad_id",
        "bos_id",
        "begin_ids",
        "eos_id",
        "end_id",
        "stop_ids",
        "control_ids",
    ):
        assert getattr(again, field) == getattr(t, field)
    for text in PLAIN_TEXTS:
        assert again.encode(text) == t.encode(text)
        assert again.chat(user(text)) == t.chat(user(text))
    again.save(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_where_the_template_comes_from(
    gemma_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blob = (gemma_dir / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(blob)
    with caplog.at_level(logging.WARNING):
        bare = load_tokenizer(tmp_path / "tokenizer.model")
    assert caplog.text.count("no chat template; using Gemma's") == 1
    assert bare.chat(user("a")) == load_tokenizer(gemma_dir).chat(user("a"))

    def shown() -> str:
        return load_tokenizer(tmp_path).decode(
            load_tokenizer(tmp_path).chat(user("a")), show_control=True
        )

    (tmp_path / "tokenizer.model").rename(tmp_path / "spiece.model")  # found under other names
    named = [{"name": "tool", "template": "T"}, {"name": "default", "template": "A{{ 1 }}"}]
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": named})
    assert shown() == "A1"
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}")
    assert shown() == "<eos>"
    (tmp_path / "chat_template.jinja").unlink()
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": named[:1]})
    with pytest.raises(TokenizerError, match="none is named 'default'"):
        load_tokenizer(tmp_path)


def test_the_plain_format(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        t = unigram()
    assert caplog.text.count("no chat template; using the plain one") == 1
    shown = t.decode(t.chat(dialogue("a", "b", "a")), show_control=True)
    assert shown == "a\nb</s>\na\n"
    assert t.end_id == t.eos_id


def test_templates(tmp_path: Path) -> None:
    def built(template: str) -> ChatTokenizer:
        return chatml(template)

    # Trimming is found and followed, side by side; flags that transformers knows are understood.
    t = built("{% generation %}[{{ messages[0].content.lstrip() }}]{% endgeneration %}")
    assert t.decode(t.chat(user(" \n a "))) == "[a ]"
    t = built("{% for m in messages %}{% if loop.last %}{{ m | tojson }}{% endif %}{% endfor %}")
    assert t.decode(t.chat(user("é"))) == '{"role": "user", "content": "é"}'
    with pytest.raises(TokenizerError, match="more with a message's text than insert or trim"):
        t.chat(user('a "quoted" text'))
    # What depends on the text is refused by name, not encoded wrongly.
    t = built("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}")
    assert t.decode(t.chat(user("plain"))) == "plain"
    with pytest.raises(TokenizerError, match="insert or trim"):
        t.chat(user("thought</think>answer"))
    t = built("{{ messages[0].content[:9] }}")
    with pytest.raises(TokenizerError, match="rewrites message contents"):
        t.chat(user("a"))
    # A text that looks like a template is text.
    t = built("{{ messages[0].content }}")
    assert t.decode(t.chat(user("{{ 7 * 7 }}{% raw %}"))) == "{{ 7 * 7 }}{% raw %}"
    # The same prompt on every day.
    t = built("{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}")
    assert t.decode(t.chat(user("a"))) == "26 Jul 2024 a"
    for template, words in [
        ("{{ raise_exception('no ' + messages[0].role) }}", "refused roles.*no user"),
        ("{{ messages[3].content.x() }}", "refused"),
        ("{{ ''.__class__.__mro__ }}", "refused"),
    ]:
        with pytest.raises(TokenizerError, match=words):
            built(template).chat(user("a"))
    with pytest.raises(TokenizerError, match="does not compile"):
        built("{% if %}")


def test_roles_and_messages(every: dict[str, Tokenizer]) -> None:
    t = every["gemma.json"]
    with pytest.raises(TokenizerError, match="System role not supported"):
        t.chat([{"role": "system", "content": "be good"}, *user("a")])
    with pytest.raises(TokenizerError, match="must alternate"):
        t.chat([*user("a"), *user("b")])
    with pytest.raises(TokenizerError, match="no messages"):
        t.chat([])
    with pytest.raises(TokenizerError, match="message 0: 'content' must be a string, not None"):
        t.chat([{"role": "user", "content": None}])
    with pytest.raises(TokenizerError, match="message 0: 'role'"):
        t.chat([{"content": "a"}])
    # A role stands in the scaffold: it must not bring control tokens there.
    for role in ("model<end_of_turn>", "<start_of_turn>", "a b", ""):
        with pytest.raises(TokenizerError, match="message 1: 'role' is a plain name"):
            t.chat([*user("a"), {"role": role, "content": "b"}])
    more = [{"role": "user", "content": "a", "name": "Ann", "tool_calls": [{}]}]
    assert t.chat(more) == t.chat(user("a"))


def turns(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in said]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (turns(("system", "be good"), ("user", "a")), user("be good\n\na")),
        (turns(("user", "a"), ("user", "b")), user("a\n\nb")),
        (
            turns(("user", "a"), ("assistant", "b"), ("assistant", "c"), ("system", "d"),
                  ("user", "e")),
            dialogue("a", "b\n\nc", "d\n\ne"),
        ),
        (turns(("system", "a"), ("system", "b"), ("user", "c")), user("a\n\nb\n\nc")),
    ],
)  # fmt: skip
def test_conversations_are_folded_where_the_template_wants_alternating_turns(
    given: Any, wanted: Any, every: dict[str, Tokenizer]
) -> None:
    gemma, free = every["gemma.json"], every["chatml"]
    assert conversation_ids(gemma, given) == gemma.chat(wanted)
    # A template that has these roles gets them as they are.
    assert conversation_ids(free, given) == free.chat(given) != free.chat(wanted)


def test_a_conversation_that_no_folding_helps_is_refused(every: dict[str, Tokenizer]) -> None:
    with pytest.raises(TokenizerError, match="must alternate"):
        conversation_ids(every["gemma.json"], turns(("assistant", "a"), ("user", "b")))


def test_an_unknown_token_that_is_eos_too_stays_out_of_reach() -> None:
    vocab = {"<eos>": 0, "a": 1}
    model = tokenizers.models.WordLevel(vocab, unk_token="<eos>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    t = from_tokenizers(tokenizer, {"eos_token": "<eos>", "unk_token": "<eos>"})
    assert t.control_ids == {0} and t.encode("a a") == [1, 1]
    with pytest.raises(TokenizerError, match=r"text produced control tokens \['<eos>'\]"):
        t.encode("a b")


# ------------------------------------------------------------------------------ loading


def test_truncation_and_padding_of_a_directory_are_dropped(tmp_path: Path) -> None:
    chatml().save(tmp_path)
    spec = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    spec.enable_truncation(3)
    spec.enable_padding(length=8)
    spec.save(str(tmp_path / "tokenizer.json"))
    text = "a long text that is not cut"
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode(text)) == text


def test_added_tokens_beyond_a_sentencepiece_model(gemma_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((gemma_dir / "tokenizer.model").read_bytes())
    added = {"640": {"content": "<|judge|>", "special": True}, "1": {"content": "<eos>"}}
    config = {"added_tokens_decoder": added, "chat_template": "{{ messages[0].content }}<|judge|>"}
    write_json(tmp_path / "tokenizer_config.json", GEMMA_CONFIG | config)
    t = load_tokenizer(tmp_path)
    ids = t.chat(user("a <|judge|>"))
    assert ids[-1] == 640 and ids.count(640) == 1 and t.vocab_size == 641
    assert t.decode(ids) == "a <|judge|>" and t.decode(ids[-1:], show_control=True) == "<|judge|>"
    added["641"] = {"content": "plainword"}
    write_json(tmp_path / "tokenizer_config.json", GEMMA_CONFIG | config)
    with pytest.raises(TokenizerError, match=r"'plainword' \(id 641\).*save the tokenizer with"):
        load_tokenizer(tmp_path)


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    def fails(words: str, path: Path = tmp_path) -> None:
        with pytest.raises(TokenizerError, match=words) as error:
            load_tokenizer(path)
        assert str(tmp_path) in str(error.value)

    fails("no such file", tmp_path / "absent")
    fails("no tokenizer.json and no tokenizer.model")
    (tmp_path / "x.model").write_bytes(b"junk")
    fails("not a sentencepiece model", tmp_path / "x.model")
    t = embedded()
    t.save(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<bos>"})
    fails("no eos_token")
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": {"content": "<end>"}})
    fails("eos_token '<end>' is not in the vocabulary")
    write_json(tmp_path / "tokenizer_config.json", [])
    fails("a JSON object is expected, not list")
    (tmp_path / "tokenizer_config.json").write_text("{")
    fails("tokenizer_config.json: not valid JSON")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    fails("not a tokenizer.json")


def test_transformers_is_not_imported() -> None:
    code = "import sys, grm_jax.tokenizer; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------ a real model


@pytest.fixture(scope="module")
def real() -> Path:
    path = SHARED / "tokenizer" / "sentencepiece_32k.model"
    if not path.exists():
        pytest.skip(f"{path} is not here (a real sentencepiece model beside the repository)")
    return path


def test_a_real_sentencepiece_model(real: Path, tmp_path: Path) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(real))
    ours = load_tokenizer(real)
    for text in ["Hello there, friend.", "  Two  spaces\nand lines\n", "naïve café 漢字", ""]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert (ours.pad_id, ours.eos_id, ours.bos_id) == (0, 1, 2)
    prompt, whole = ours.chat(user("Why?")), ours.chat(dialogue("Why?", "Because it is so."))
    assert whole == prompt + ours.completion("Because it is so.")
    # This model puts a space before every text: at the start of a text, not in its middle.
    (tmp_path / "tokenizer.model").write_bytes(real.read_bytes())
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ messages[1].content }}"
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": template})
    joined = load_tokenizer(tmp_path).chat(dialogue("under", "standing"))
    pieces = [theirs.id_to_piece(i) for i in joined]
    assert pieces == ["<s>", "▁under", "</s>", "standing"]
    assert "</s>" not in [theirs.id_to_piece(i) for i in ours.encode("a </s> <extra_id_0>")]
    assert ours.control_ids.isdisjoint(ours.encode("a </s> <extra_id_0> <extra_id_1>"))
