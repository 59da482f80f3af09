"""Model folders as people have them, through convert, train's start and a judge's."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grm_jax import convert, hub
from grm_jax.errors import UserError
from grm_jax.judge.about import model_info
from grm_jax.judge.judge import Judge
from grm_jax.judge.request import JudgeOptions
from grm_jax.model import huggingface, storage
from grm_jax.model.config import ModelConfig
from grm_jax.model.hf_config import config_json, copy_tokenizer
from grm_jax.model.params import param_table
from grm_jax.parallel.options import MeshConfig
from grm_jax.tokenizer import load_tokenizer
from grm_jax.training.run import Run
from grm_jax.training.setup import Setup

INPUTS = Path(__file__).parent / "inputs"
ROWS = 600
CONFIG = ModelConfig(
    num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=24,
    query_pre_attn_scalar=8, vocab_size=ROWS, sliding_window=16, max_position=160,
)  # fmt: skip
NAMES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
IDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
MINE = "{# grm_jax: name=mine low=0 high=100 reads=scores #}\n{{ query }}\n{{ responses }}\n"


def edit(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; a value of `...` removes the key."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def make(root: Path, num_labels: int = 0) -> Path:
    """A Hugging Face folder of 600 rows with a tokenizer of 600 ids."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=spec.hf_shape).astype(np.float32)
        for spec in param_table(CONFIG, num_labels=num_labels)
        for _, name in spec.hf_names()
    }
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    content = config_json(CONFIG, num_labels=num_labels, dtype="float32", ids=IDS)
    (root / "config.json").write_text(json.dumps(content))
    spec = json.loads((INPUTS / "17_tokenizers" / "version_2.0.tokenizer.json").read_text())
    (root / "tokenizer.json").write_text(json.dumps(spec | {"version": "1.0"}))
    (root / "tokenizer_config.json").write_text(json.dumps(NAMES))
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "hf")


def run(command: str, source: Path, target: Path) -> None:
    convert.main([command, "--input", str(source), "--output", str(target)])


def refused(command: str, source: Path, *words: str) -> None:
    """The command prints one line with these words and writes no model."""
    target = source.parent / "refused"
    with pytest.raises(SystemExit) as error:
        run(command, source, target)
    message = str(error.value.code)
    assert message.startswith("convert: ") and "\n" not in message
    for word in words:
        assert word in message
    assert not storage.is_model_dir(target) and not huggingface.is_checkpoint_dir(target)


def roundtrip(folder: Path) -> tuple[Path, Path]:
    """(model directory, Hugging Face folder) made of a folder by the command."""
    native, out = folder.parent / "native", folder.parent / "out"
    run("import", folder, native)
    run("export", native, out)
    return native, out


# ------------------------------------------------------------------------------------ stop ids


@pytest.mark.parametrize(
    ("generation", "config", "stops"),
    [
        (None, [1, 4, 9], (1, 4, 9)),
        (None, 9, (1, 4, 9)),
        (None, ..., (1, 4)),
        ({"eos_token_id": [1, 4, 9]}, 1, (1, 4, 9)),
        ({"eos_token_id": [1, 4, 9]}, ..., (1, 4, 9)),
        ({"top_k": 50}, [1, 4, 9], (1, 4, 9)),
        ({"eos_token_id": None, "top_k": 50}, [1, 4, 9], (1, 4, 9)),
        ({"eos_token_id": [7]}, [1, 4, 9], (1, 4, 7)),
    ],
)
def test_the_same_ids_stop_before_and_after_import_and_export(folder, generation, config, stops):
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    edit(folder / "config.json", eos_token_id=config)
    for where in (folder, *roundtrip(folder)):
        assert load_tokenizer(where).stop_ids == stops, where
    if generation is not None and "top_k" in generation:
        kept = json.loads((folder.parent / "out" / "generation_config.json").read_text())
        assert kept["top_k"] == 50


def test_the_users_list_that_stands_only_in_config_json(folder):
    theirs = json.loads((INPUTS / "12_config_eos_list_only_here.json").read_text())
    edit(folder / "config.json", eos_token_id=theirs["eos_token_id"])
    assert {load_tokenizer(where).stop_ids for where in roundtrip(folder)} == {(1, 4, 9)}
    shutil.copyfile(INPUTS / "12_generation_config.json", folder / "generation_config.json")
    edit(folder / "config.json", eos_token_id=1)
    assert load_tokenizer(folder).stop_ids == (1, 4, 9)


# ------------------------------------------------------------------------------ files and links


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
     "generation_config.json", "chat_template.jinja", "chat_template.json", "grm.json",
     "added_tokens.json", "special_tokens_map.json"],
)  # fmt: skip
def test_a_link_that_leads_nowhere_stops_the_import_by_name(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../../blobs/gone")
    refused("import", folder, f"{name}: a link to ../../blobs/gone, which is not there")


def test_such_links_of_shards(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    tensors = load_file(folder / "a.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    huggingface.load(folder)
    (folder / "a.safetensors").unlink()
    (folder / "a.safetensors").symlink_to("gone")
    refused("import", folder, "a.safetensors: a link to gone")
    index["weight_map"]["model.norm.weight"] = ["a"]  # type: ignore[assignment]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("import", folder, "model.safetensors.index.json", "model.norm.weight is in ['a']")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_pointers_of_git_lfs(folder, name):
    shutil.copyfile(INPUTS / "17_tokenizers" / "git_lfs_pointer.tokenizer.json", folder / name)
    refused("import", folder, f"{name}: a Git LFS pointer", "git lfs pull")


def test_a_byte_order_mark_in_each_file_goes_both_ways(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 4, 9]}))
    (folder / "grm.json").write_text(json.dumps({"trained": False}))
    for file in folder.glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    for where in (folder, *roundtrip(folder)):
        assert load_tokenizer(where).stop_ids == (1, 4, 9)
        assert model_info(where)["trained"] is False


def test_chat_templates_are_all_copied(folder):
    (folder / "chat_template.jinja").write_text("A")
    (folder / "chat_template.json").write_text('{"chat_template": "B"}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("C")
    for where in roundtrip(folder):
        assert (where / "chat_template.jinja").read_text() == "A"
        assert (where / "chat_template.json").read_text() == '{"chat_template": "B"}'
        assert (where / "additional_chat_templates" / "rag.jinja").read_text() == "C"
    assert "additional_chat_templates/rag.jinja" in copy_tokenizer(folder, folder)


def test_convert_prints_no_raw_logging(folder, capfd):
    convert.main(["random", "--tokenizer", str(folder), "--output", str(folder.parent / "random")])
    roundtrip(folder.parent / "random")
    printed = "".join(capfd.readouterr())
    assert "no chat template; using Gemma's" in printed
    for raw in ("WARNING", "grm_jax.tokenizer", "absl", "OCDBT"):
        assert raw not in printed


# --------------------------------------------------------------------------- config and weights


@pytest.mark.parametrize(
    ("key", "assumed"),
    [("head_dim", 256), ("num_hidden_layers", 26), ("hidden_size", 2304), ("vocab_size", 256000),
     ("num_attention_heads", 8), ("num_key_value_heads", 4), ("intermediate_size", 9216)],
)  # fmt: skip
def test_a_missing_key_says_what_transformers_assumes(folder, key, assumed):
    edit(folder / "config.json", **{key: ...})
    refused("import", folder, f"config.json: {key} is missing", f'add "{key}": {assumed}')


def test_the_users_config_without_head_dim(folder):
    shutil.copyfile(INPUTS / "15_config_without_head_dim.json", folder / "config.json")
    refused("import", folder, "config.json: head_dim is missing", '"head_dim": 256')


@pytest.mark.parametrize("count", ["x", 0, -1, None, [1], True])
def test_an_ill_typed_width_of_a_scalar_head(tmp_path, count):
    folder = make(tmp_path / "rm", num_labels=1)
    edit(folder / "config.json", id2label=..., num_labels=count)
    refused("import", folder, "config.json: num_labels is ")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": None}, "config is None"),
        ({"config": []}, "config is []"),
        ({"config": {"embed_dim": 16}}, "config: num_layers, num_heads, "),
        ({"num_labels": "one"}, "num_labels is 'one'"),
        ({"num_labels": ...}, "num_labels is None"),
        ({"embed_dim": "16"}, "config.embed_dim is '16'; an integer is expected"),
        ({"num_kv_heads": 0}, "num_kv_heads=0; give a positive number"),
        ({"rope_theta": None}, "config.rope_theta is None"),
    ],
)
def test_model_json_is_read_by_type(folder, changes, words):
    native = convert_of(folder)
    file = native / "model.json"
    inner = {k: v for k, v in changes.items() if k not in ("config", "num_labels")}
    outer = {k: v for k, v in changes.items() if k not in inner}
    edit(file, **outer)
    if inner:
        edit(file, config=json.loads(file.read_text())["config"] | inner)
    with pytest.raises(UserError) as error:
        storage.read_model_file(native)
    assert str(error.value).startswith(f"{file}: ") and words in str(error.value)


def test_untied_without_a_head_is_refused(folder):
    theirs = json.loads((INPUTS / "16_config_untied.json").read_text())
    edit(folder / "config.json", tie_word_embeddings=theirs["tie_word_embeddings"])
    refused("import", folder, "tie_word_embeddings", "so lm_head.weight is needed")
    with pytest.raises(UserError, match=r"lm_head.weight is needed"):
        huggingface.load(folder)
    # Of a tied model a head that is the embedding may be stored; another is refused.
    edit(folder / "config.json", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    huggingface.load(folder)
    head[5, 5] += 1
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    refused("import", folder, "lm_head.weight differs")
    edit(folder / "config.json", tie_word_embeddings="no")
    refused("import", folder, "tie_word_embeddings is 'no'")


def test_an_untied_scalar_model_needs_no_head(tmp_path):
    folder = make(tmp_path / "rm", num_labels=1)
    edit(folder / "config.json", tie_word_embeddings=False)
    huggingface.load(folder, num_labels=1)


def test_the_weights_of_a_scalar_model_under_a_language_models_name(tmp_path):
    folder = make(tmp_path / "rm", num_labels=1)
    edit(folder / "config.json", architectures=["Gemma2ForCausalLM"])
    refused("import", folder, "score.weight is a scalar head", "declares a language model")


# -------------------------------------------------------------------- tokenizer and embedding


def add_tokens(folder: Path, count: int) -> None:
    """`count` more tokens in tokenizer.json than the embedding has rows."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"] += [
        {"id": ROWS + i, "content": f"<new{i}>", "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": False}
        for i in range(count)
    ]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def start(tmp_path: Path, **given: Any) -> Run:
    setup = Setup(run_dir=str(tmp_path / "run"), mesh=MeshConfig(1, 1, 1), **given)
    return Run(setup, jax.devices()[:1])


def test_more_ids_than_rows_are_refused_at_the_start(folder, tmp_path, one_device):
    tokenizer = shutil.copytree(folder, tmp_path / "tokenizer")
    add_tokens(tokenizer, 100)
    with pytest.raises(UserError, match=r"700 token ids.* 600 rows"):
        _ = start(tmp_path, base=str(folder), tokenizer=str(tokenizer)).tokenizer
    add_tokens(folder, 100)
    with pytest.raises(UserError, match=r"700 token ids.* 600 rows"):
        _ = start(tmp_path, base=str(folder)).tokenizer
    with pytest.raises(UserError, match=r"700 token ids.* 600 rows"):
        Judge.load(folder, mesh=one_device)
    refused("import", folder, "700 token ids", "600 rows")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model_is_said(folder, tmp_path, caplog):
    tokenizer = shutil.copytree(folder, tmp_path / "tokenizer")
    given = {"base": str(folder), "tokenizer": str(tokenizer)}
    with caplog.at_level("WARNING"):
        assert start(tmp_path, **given).tokenizer.vocab_size == ROWS
    assert "other pieces" not in caplog.text
    swap_two_pieces(tokenizer)
    with caplog.at_level("WARNING"):
        assert start(tmp_path, **given).tokenizer.vocab_size == ROWS
    assert "2 ids stand for other pieces than in the tokenizer of" in caplog.text
    # The same of a model to start from.
    caplog.clear()
    begun = start(tmp_path, base=str(folder))
    begun.require(str(folder))
    assert "other pieces" not in caplog.text
    begun.require(str(tokenizer))
    assert "2 ids stand for other pieces than in the tokenizer of" in caplog.text


def swap_two_pieces(folder: Path) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    last, other = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[last], vocabulary[other] = vocabulary[other], vocabulary[last]
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def test_fewer_ids_than_rows_are_usual(folder, one_device):
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["vocab"] = {k: v for k, v in spec["model"]["vocab"].items() if v < 590}
    merges = spec["model"]["merges"]
    spec["model"]["merges"] = [m for m in merges if "".join(m) in spec["model"]["vocab"]]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    assert Judge.load(folder, mesh=one_device).tokenizer.vocab_size == 590
    roundtrip(folder)


def test_a_scalar_model_is_no_judge_and_a_judge_no_meta_rm(folder, tmp_path, one_device):
    meta = make(tmp_path / "meta", num_labels=1)
    Judge.load(folder, meta, mesh=one_device)
    for wrong in (meta, convert_of(meta)):
        with pytest.raises(UserError, match=r"a scalar model .* give a language model"):
            Judge.load(wrong, mesh=one_device)
    for wrong in (folder, convert_of(folder)):
        with pytest.raises(UserError, match=r"a language model, which can not score.* meta RM"):
            Judge.load(folder, wrong, mesh=one_device)
    with pytest.raises(UserError, match="nosuch: no such directory"):
        Judge.load(folder, "nosuch", mesh=one_device)


def convert_of(folder: Path) -> Path:
    target = folder.with_name(folder.name + "-native")
    run("import", folder, target)
    return target


def test_a_meta_rm_of_another_vocabulary(folder, tmp_path, one_device):
    meta = make(tmp_path / "meta", num_labels=1)
    swap_two_pieces(meta)
    with pytest.raises(UserError, match=r"its tokenizer is not that of .*id 59\d differs"):
        Judge.load(folder, meta, mesh=one_device)


# --------------------------------------------------------------------------- grm.json, templates


@pytest.fixture
def trained(folder: Path, tmp_path: Path, monkeypatch) -> Path:
    """A model directory whose grm.json names an own template by a relative path."""
    native = tmp_path / "model"
    run("import", folder, native)
    about = {
        "stage": "rl",
        "trained": True,
        "templates": {"many": "own.jinja"},
        "judge": {"temperature": 0.9, "max_new_tokens": 33},
        "length_buckets": [64, 160],
    }
    (native / "grm.json").write_text(json.dumps(about))
    (tmp_path / "own.jinja").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return native


def test_export_and_import_carry_grm_json_with_its_templates(
    trained, tmp_path, monkeypatch, one_device
):
    before = Judge.load(trained, mesh=one_device)
    run("export", trained, tmp_path / "out")
    run("import", tmp_path / "out", tmp_path / "back")
    (tmp_path / "own.jinja").unlink()
    monkeypatch.chdir("/")
    for where in (tmp_path / "out", tmp_path / "back"):
        assert model_info(where) == {"path": str(where), "stage": "rl", "trained": True}
        judge = Judge.load(where, mesh=one_device)
        assert judge.defaults == before.defaults
        assert judge.templates.many.source == MINE  # type: ignore[union-attr]
        options = JudgeOptions()
        assert judge.about(options) == before.about(options)
        assert judge.scales(options) == before.scales(options)
    with pytest.raises(
        UserError, match=r"grm\.json: templates\.many is 'own\.jinja'.*copy the file"
    ):
        Judge.load(trained, mesh=one_device)
    refused("export", trained, "grm.json: templates.many is 'own.jinja'")


def test_random_weights_stay_untrained(folder, tmp_path):
    convert.main(["random", "--tokenizer", str(folder), "--output", str(tmp_path / "random")])
    for where in (tmp_path / "random", *roundtrip(tmp_path / "random")):
        assert json.loads((where / "grm.json").read_text()) == {"trained": False}
        assert model_info(where)["trained"] is False


def test_a_broken_grm_json_stops_convert_by_name(folder):
    shutil.copyfile(INPUTS / "05_grm_unknown_judge_field.json", folder / "grm.json")
    refused("import", folder, "grm.json: judge has the fields ['top_p']")
    shutil.copyfile(INPUTS / "05_grm_cut_off.json", folder / "grm.json")
    refused("import", folder, "grm.json: not valid JSON")


def test_a_plain_folder_gets_no_grm_json(folder):
    assert not any((where / "grm.json").exists() for where in roundtrip(folder))


def test_a_run_holds_its_templates_from_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = dataclasses.replace(Setup().templates, many="own.jinja")
    with pytest.raises(UserError, match=r"no template 'own\.jinja'"):
        start(tmp_path, templates=names)
    (tmp_path / "own.jinja").write_text(MINE)
    begun = start(tmp_path, templates=names)
    (tmp_path / "own.jinja").unlink()
    assert begun.templates.many.source == MINE


# ------------------------------------------------------------------------------------- the hub


def test_the_hubs_cache_and_repo_ids(folder, tmp_path, monkeypatch, one_device):
    """As the hub's cache has it: links into blobs/; every road takes the top folder and the id."""
    top = tmp_path / "hub" / "models--google--gemma-2-2b-it"
    snapshot = top / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (top / "blobs").mkdir()
    for file in folder.iterdir():
        shutil.copyfile(file, top / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    monkeypatch.setattr(hub, "_fetch", lambda name, weights: snapshot)
    monkeypatch.chdir(tmp_path)
    for name in (str(top), str(top / "snapshots"), "google/gemma-2-2b-it"):
        begun = start(tmp_path, base=name, tokenizer=name)
        assert begun.tokenizer.vocab_size == begun.model.vocab_size == ROWS
        begun.require(name)
        assert Judge.load(name, mesh=one_device).model.vocab_size == ROWS
        assert model_info(Path(name))["path"] == str(snapshot)
    run("import", Path("google/gemma-2-2b-it"), tmp_path / "a")
    run("import", top, tmp_path / "b")
    convert.main(["random", "--tokenizer", str(top), "--output", str(tmp_path / "c")])
    (top / "blobs" / "tokenizer_config.json").unlink()
    refused("import", top, "snapshots/abc123/tokenizer_config.json: a link to ../../blobs/")
