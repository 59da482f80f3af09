"""A judge and a meta RM that transformers saved, found as repo ids in the hub's cache.

The pair has the shape of the 27B in heads, softcaps and the scale of queries. Its weights are
random, but for a few steps of Adam that teach the judge to write critiques that can be read.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax import convert, evaluate, hub
from grm_jax.critique import Template, render
from grm_jax.errors import UserError
from grm_jax.judge.about import About
from grm_jax.judge.judge import Judge
from grm_jax.judge.meta import load_meta_rm
from grm_jax.judge.request import JudgeDefaults
from grm_jax.model import heads, huggingface, transformer
from grm_jax.sampler.options import EngineConfig
from grm_jax.tokenizer.chat_template import GEMMA_TEMPLATE

pytestmark = pytest.mark.slow
GRM, META = "BBQGOD/DeepSeek-GRM-27B", "BBQGOD/DeepSeek-GRM-27B-MetaRM"
QUERY, RESPONSES = "What is 2 + 2?", ("4", "5")
CRITIQUES = (
    "Specific Criteria: correct (100%).\nAnalysis: 4 is right.\nScores: \\boxed{9, 3}",
    "Specific Criteria: clear (60%), short (40%).\nAnalysis: 5 is better.\nScores: \\boxed{2, 8}",
    "Specific Criteria: correct (100%).\nAnalysis: both are fair.\nScores: \\boxed{6, 5}",
)
CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
ROWS = 1024  # of the embedding: more than the tokenizer has ids
TAIL = WINDOW = 64  # tokens before a critique that the judge is taught with


@dataclasses.dataclass(frozen=True)
class Pair:
    """What transformers saved; `cache` is laid out as huggingface_hub has it."""

    cache: Path
    tokenizer: Any
    judge: Any
    meta: Any

    def snapshot(self, repo: str) -> Path:
        return self.cache / f"models--{repo.replace('/', '--')}" / "snapshots" / "0123abcd"


def gemma_tokenizer(transformers):
    """transformers' own GemmaTokenizer, over byte pairs of the texts of this file."""
    import tokenizers
    from tokenizers import normalizers, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    templates = map(Template.load, ("grm", "meta"))
    texts = [m["content"] for t in templates for m in render(t, QUERY, RESPONSES)]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=[*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    backend.train_from_iterator([*texts, *CRITIQUES, "user model"], trainer)
    model = json.loads(backend.to_str())["model"]
    found = transformers.GemmaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
    )
    found.chat_template = GEMMA_TEMPLATE
    return found


def shape_of_27b(transformers, **more):
    return transformers.Gemma2Config(
        num_attention_heads=32, num_key_value_heads=16, query_pre_attn_scalar=144,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        num_hidden_layers=2, hidden_size=96, head_dim=8, intermediate_size=192, vocab_size=ROWS,
        sliding_window=WINDOW, pad_token_id=0, eos_token_id=[1, 6], bos_token_id=2, **more,
    )  # fmt: skip


def teach(torch, model, tokenizer) -> None:
    """Make the model write one of the critiques at the end of a prompt."""
    message = render(Template.load("grm"), QUERY, RESPONSES)
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)[
        -TAIL:
    ]
    said = [[*tokenizer.encode(text, add_special_tokens=False), 6] for text in CRITIQUES]
    width = max(map(len, said))
    ids = torch.tensor([prompt + row + [0] * (width - len(row)) for row in said])
    targets = ids[:, TAIL:].masked_fill(ids[:, TAIL:] == 0, -100)
    # Its global layer hardly looks back: what it learns of the tail holds after the whole prompt.
    looks = model.model.layers[1].post_attention_layernorm.weight
    looks.requires_grad_(False).fill_(-0.98)
    adam = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], 5e-3)
    for _ in range(110):
        logits = model(ids).logits[:, TAIL - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets)
        adam.zero_grad()
        loss.backward()
        adam.step()


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = gemma_tokenizer(transformers)
    judge = transformers.Gemma2ForCausalLM._from_config(
        shape_of_27b(transformers), attn_implementation="eager"
    )
    teach(torch, judge, tokenizer)
    meta = transformers.Gemma2ForSequenceClassification._from_config(
        shape_of_27b(transformers, num_labels=1), attn_implementation="eager"
    )
    with torch.no_grad():
        for name, weight in meta.named_parameters():
            weight.normal_(std=0.4 if "norm" in name else 1.2 * weight[0].numel() ** -0.5)
    meta = meta.to(torch.bfloat16)
    pair = Pair(tmp_path_factory.mktemp("hub"), tokenizer, judge.eval(), meta.eval())
    for repo, model in ((GRM, judge), (META, meta)):
        folder = pair.snapshot(repo)
        model.save_pretrained(folder, max_shard_size="300KB")
        tokenizer.save_pretrained(folder, save_jinja_files=False)
        (folder / "README.md").write_text("a card")
        for part in ("refs", "blobs"):
            (folder.parents[1] / part).mkdir()
        (folder.parents[1] / "refs" / "main").write_text(folder.name)
    # Less room than the defaults take, so that the test is quick.
    room = EngineConfig(max_rows=8, page=64, prefill_tokens=1024, chunk=16, min_lanes=4)
    About(judge=JudgeDefaults(max_new_tokens=40), engine=room).write(pair.snapshot(GRM))
    # The weights that bfloat16 kept, computed in float32 as here. Not by `meta.float()`: the rotary
    # frequencies have been rounded with the weights.
    whole = transformers.Gemma2ForSequenceClassification.from_pretrained(
        pair.snapshot(META), dtype=torch.float32, attn_implementation="eager"
    )
    return dataclasses.replace(pair, meta=whole.eval())


@pytest.fixture
def offline(pair, monkeypatch, tmp_path) -> Pair:
    """The cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(pair.cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    hub._fetch.cache_clear()
    return pair


def test_the_files_are_those_that_such_a_repo_has(pair):
    for repo, kind in ((GRM, "CausalLM"), (META, "SequenceClassification")):
        names = {path.name for path in pair.snapshot(repo).iterdir()}
        assert "model.safetensors.index.json" in names and "model.safetensors" not in names
        assert "chat_template.jinja" not in names
        config = json.loads((pair.snapshot(repo) / "config.json").read_text())
        assert config["architectures"] == [f"Gemma2For{kind}"]
        said = json.loads((pair.snapshot(repo) / "tokenizer_config.json").read_text())
        assert said["chat_template"] == GEMMA_TEMPLATE and len(pair.tokenizer) < ROWS


def test_a_pair_of_transformers_judges(offline, one_device):
    """k = 4, and the meta RM chooses two: each of its logits is that of transformers."""
    import torch

    judge = Judge.load(GRM, META, mesh=one_device, compute_dtype="float32")
    assert judge.model.vocab_size == ROWS and judge.tokenizer.stop_ids == (1, 6)
    found = judge.score(QUERY, RESPONSES, k=4)
    rows = found.critiques
    assert len(rows) == 4 and all(row.scores for row in rows), "they can be read"
    texts = []
    for row in rows:
        shown = [RESPONSES[i] for i in row.order]
        turns = render(Template.load("meta"), QUERY, shown)
        turns = [*turns, {"role": "assistant", "content": row.text}]
        texts.append(offline.tokenizer.apply_chat_template(turns, tokenize=False))
    # A row ends with the token that ends the critique, without the template's last newline.
    batch = offline.tokenizer(
        [text.removesuffix("\n") for text in texts],
        add_special_tokens=False, padding=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        logits = offline.meta(**batch).logits[:, 0].numpy()
    np.testing.assert_allclose([row.meta for row in rows], logits, atol=1e-4, rtol=1e-4)
    print("critiques, meta scores here and in transformers:")
    for row, logit in zip(rows, logits, strict=True):
        print(f"  {row.scores} {row.meta:+.6f} {logit:+.6f}")
    kept = [rows[i].scores for i in np.argsort(-logits, kind="stable")[:2]]
    assert found.scores == tuple(np.mean(kept, axis=0)), "the vote of the two that it trusts"
    print("guided vote:", found.scores)


def test_logits_of_a_random_judge(pair, tmp_path):
    """In both kinds of layers; the sliding window is shorter than the prompt."""
    import torch
    import transformers

    random = transformers.Gemma2ForCausalLM._from_config(
        shape_of_27b(transformers), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, weight in random.named_parameters():
            weight.normal_(std=0.4 if "norm" in name else 1.2 * weight[0].numel() ** -0.5)
    random.save_pretrained(tmp_path, max_shard_size="300KB")
    ids = pair.tokenizer.apply_chat_template(
        render(Template.load("grm"), QUERY, RESPONSES),
        add_generation_prompt=True, return_dict=True, return_tensors="np",
    )["input_ids"]  # fmt: skip
    config, params = huggingface.load(tmp_path)
    attend = transformer.self_attend(config, np.arange(ids.shape[1])[None])
    hidden, _ = transformer.forward(
        params, config, jnp.asarray(ids), np.arange(ids.shape[1])[None], attend
    )
    ours = np.asarray(heads.logits(params, config, hidden))
    with torch.no_grad():
        theirs = random(torch.tensor(ids)).logits.numpy()
    print(f"{ids.shape[1]} tokens, largest difference of a logit {np.abs(ours - theirs).max():.1e}")
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_repo_ids_of_the_other_commands(offline, tmp_path, capsys):
    convert.main(["import", "--input", META, "--output", str(tmp_path / "meta")])
    assert "read as bfloat16" in capsys.readouterr().out
    data = tmp_path / "mine.jsonl"
    data.write_text(json.dumps({"query": QUERY, "responses": RESPONSES, "labels": [1, 0]}) + "\n")
    evaluate.main(
        ["--bench", "preferences", "--data", str(data), "--model", GRM, "--meta", META, "-k", "2",
         "--output", str(tmp_path / "out"), "--resamples", "20"]
    )  # fmt: skip
    results = json.loads((tmp_path / "out" / "preferences" / "results.json").read_text())
    assert any("meta" in method["name"] for method in results["methods"])


def test_what_is_not_in_the_cache_is_named_with_its_folder(offline, one_device, capsys, tmp_path):
    repo = "google/gemma-2-2b-it"
    folder = offline.cache / "models--google--gemma-2-2b-it"
    wanted = [f"{repo}: not a folder", f"`hf download {repo}` fills {folder}: copy", "is set"]
    for call in (lambda: Judge.load(repo), lambda: Judge.load(GRM, repo, mesh=one_device)):
        with pytest.raises(UserError) as error:
            call()
        assert all(words in str(error.value) for words in wanted)
    data = tmp_path / "mine.jsonl"
    data.write_text(json.dumps({"query": QUERY, "responses": RESPONSES, "labels": [1, 0]}) + "\n")
    for command, arguments in (
        (convert, ["import", "--input", repo, "--output", str(tmp_path / "out")]),
        (evaluate, ["--bench", "preferences", "--data", str(data), "--model", repo]),
    ):
        with pytest.raises(SystemExit) as stopped:
            command.main(arguments)
        said = f"{stopped.value.code}{capsys.readouterr().err}"
        assert all(words in said for words in wanted), said
    # A judge is no meta RM, and the other way round, whatever the repos are called.
    with pytest.raises(UserError, match="a language model, which can not score critiques"):
        Judge.load(GRM, GRM, mesh=one_device)
    with pytest.raises(UserError, match="a scalar model"):
        Judge.load(META, mesh=one_device)


def test_a_download_that_lost_a_shard(offline, tmp_path, one_device):
    copy = tmp_path / "models--BBQGOD--DeepSeek-GRM-27B"
    shutil.copytree(offline.snapshot(GRM).parents[1], copy)
    shard = sorted((copy / "snapshots" / "0123abcd").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"names files that are not there: {shard.name}"):
        _ = Judge.load(copy, mesh=one_device).params


@pytest.mark.parametrize("pads_with", [0, 6])
def test_a_meta_rm_has_a_chat_template_and_padding_of_its_own(
    offline, tmp_path, one_device, pads_with
):
    """Where the end of a critique is also the padding, transformers reads one token before it."""
    import torch

    folder = tmp_path / "meta"
    shutil.copytree(offline.snapshot(META), folder)
    for name, change in (
        ("config.json", {"pad_token_id": pads_with}),
        ("tokenizer_config.json", {"pad_token": CONTROL[pads_with]}),
    ):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    template = GEMMA_TEMPLATE.replace("<start_of_turn>model", "<start_of_turn>model says:")
    template = template.replace("'model' if", "'model says:' if")
    (folder / "chat_template.jinja").write_text(template)
    judge = Judge.load(GRM, folder, mesh=one_device, compute_dtype="float32")
    rows = judge.score(QUERY, RESPONSES, k=2).critiques
    turns = [
        [*render(Template.load("meta"), QUERY, [RESPONSES[i] for i in row.order]),
         {"role": "assistant", "content": row.text}] for row in rows
    ]  # fmt: skip
    texts = offline.tokenizer.apply_chat_template(turns, tokenize=False, chat_template=template)
    assert all("model says:" in text for text in texts)
    offline.meta.config.pad_token_id = pads_with
    try:
        with torch.no_grad():
            logits = [
                offline.meta(
                    offline.tokenizer(
                        text.removesuffix("\n"), add_special_tokens=False, return_tensors="pt"
                    )["input_ids"]
                ).logits.item()
                for text in texts
            ]
    finally:
        offline.meta.config.pad_token_id = 0
    np.testing.assert_allclose([row.meta for row in rows], logits, atol=1e-4, rtol=1e-4)
    assert load_meta_rm(folder, one_device).pad_id == pads_with
