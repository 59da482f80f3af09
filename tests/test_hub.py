"""Paths, folders of the hub's cache and repo ids. Nothing here asks a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from grm_jax import hub
from grm_jax.errors import UserError


@pytest.fixture(autouse=True)
def asked(monkeypatch, tmp_path) -> list[Any]:
    """What the hub was asked; it answers that it can not be reached."""
    found: list[Any] = []

    def refuse(name: str, **options: Any) -> str:
        found.append((name, options))
        raise errors.LocalEntryNotFoundError("no network and nothing in the cache\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    hub._fetch.cache_clear()
    return found


def answer(monkeypatch, action) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", action)


def cache(root: Path, *snapshots: str, name: str = "models--google--gemma-2-2b-it") -> Path:
    """A folder as the hub's cache has it."""
    folder = root / name
    for part in ("blobs", "refs", "snapshots"):
        (folder / part).mkdir(parents=True)
    for snapshot in snapshots:
        (folder / "snapshots" / snapshot).mkdir()
        (folder / "snapshots" / snapshot / "config.json").write_text("{}")
    if snapshots:
        (folder / "refs" / "main").write_text(snapshots[0])
    return folder


def refused(name: str | Path, *words: str, **options: Any) -> None:
    with pytest.raises(UserError) as error:
        hub.resolve(name, **options)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_paths_are_themselves(tmp_path, monkeypatch, asked):
    (tmp_path / "google" / "model").mkdir(parents=True)
    (tmp_path / "google" / "t.model").write_bytes(b"x")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("google/model", "./google/model", tmp_path / "google"):
        assert hub.resolve(name) == Path(name)
    assert hub.resolve("google/t.model", weights=False) == Path("google/t.model")
    refused("google/t.model", "google/t.model: a file", "give the directory")
    assert hub.resolve("~/google/model") == tmp_path / "google" / "model"
    assert hub.resolve(Path("~/google")) == tmp_path / "google"
    assert not asked


@pytest.mark.parametrize(
    "name",
    ["nosuch", "./google/gemma", "../google/gemma", "~/gemma", "/google/gemma", "a/b/c", "a/",
     "runs/typo", "a b/c", "x/..", "./x", "~nobody/x"],
)  # fmt: skip
def test_what_looks_like_a_path_is_never_asked_of_the_hub(name, tmp_path, asked):
    (tmp_path / "runs").mkdir()
    refused(name, name, "no such directory")
    refused(name, name, "no such file or directory", weights=False)
    assert not asked


def test_a_snapshot_is_found_from_above(tmp_path):
    folder = cache(tmp_path, "abc123")
    for name in (folder, folder / "snapshots", folder / "snapshots" / "abc123"):
        assert hub.resolve(name) == folder / "snapshots" / "abc123"


def test_a_renamed_cache_folder_is_known_by_its_layout(tmp_path):
    folder = cache(tmp_path, "abc123", name="gemma")
    (tmp_path / "link").symlink_to("gemma")
    for name in (folder, tmp_path / "link", folder / "snapshots"):
        assert hub.resolve(name).name == "abc123"


def test_several_snapshots_are_named_and_none_is_guessed(tmp_path):
    folder = cache(tmp_path, "abc", "def")
    for name in (folder, folder / "snapshots"):
        refused(name, "holds 2 snapshots (main is abc)", "snapshots/abc, ", "snapshots/def")
    assert hub.resolve(folder / "snapshots" / "def").name == "def"


def test_a_cache_without_a_snapshot(tmp_path):
    folder = cache(tmp_path)
    refused(folder, "holds no snapshot", "Download it again")
    (folder / "snapshots").rmdir()
    refused(folder, "holds no snapshot")


def test_the_cache_itself_names_its_models(tmp_path):
    for name in ("models--a--b", "models--c--d"):
        cache(tmp_path / "hub", "1", name=name)
    for name in (tmp_path / "hub", tmp_path):
        refused(name, "2 models", "hub/models--a--b", "hub/models--c--d")
    # A folder that only happens to hold one, and a run, are what they are.
    (tmp_path / "hub" / "model.json").write_text("{}")
    assert hub.resolve(tmp_path / "hub") == tmp_path / "hub"
    (tmp_path / "run" / "snapshots").mkdir(parents=True)
    assert hub.resolve(tmp_path / "run") == tmp_path / "run"
    assert hub.resolve(tmp_path / "run" / "snapshots") == tmp_path / "run" / "snapshots"


def test_a_link_that_leads_nowhere(tmp_path):
    (tmp_path / "model").symlink_to("gone")
    refused("model", "model: a link to gone")


def test_a_repo_is_downloaded_once_and_without_pickles(tmp_path, monkeypatch):
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        (tmp_path / "snapshot" / "model.safetensors").touch()
        return str(tmp_path / "snapshot")

    answer(monkeypatch, download)
    for _ in range(2):
        assert hub.resolve("google/gemma-2-2b-it") == tmp_path / "snapshot"
    ((name, options),) = asked
    assert name == "google/gemma-2-2b-it"
    patterns = options["allow_patterns"]
    assert "model*.safetensors" in patterns and "config.json" in patterns
    assert not any("bin" in pattern or "pt" in pattern for pattern in patterns)
    hub.resolve(Path("google/gemma-2-2b-it"), weights=False)
    assert not any("safetensors" in p or p == "*.json" for p in asked[1][1]["allow_patterns"])


def test_patterns_take_what_is_read():
    wanted = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
              "special_tokens_map.json", "tokenizer.model", "chat_template.jinja", "grm.json",
              "chat_template.json", "additional_chat_templates/rag.jinja", "model.safetensors",
              "model-00001-of-00002.safetensors", "model.safetensors.index.json", "model.json",
              "params/manifest.ocdbt", "params/d/0"]  # fmt: skip
    unwanted = ["README.md", "pytorch_model.bin", "training_args.bin", "consolidated.safetensors"]

    def taken(names, patterns):
        return list(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=patterns))

    assert taken(wanted + unwanted, list(hub.MODEL_PATTERNS)) == wanted
    small = [n for n in wanted[:10] if n != "grm.json"]
    assert taken(wanted + unwanted, list(hub.TOKENIZER_PATTERNS)) == small


def test_a_repo_that_can_not_be_reached_says_what_to_fetch(asked, monkeypatch):
    words = ("google/gemma-2-2b-it: not a folder and not reachable",
             "`hf download google/gemma-2-2b-it` fills ", "/models--google--gemma-2-2b-it: copy",
             "--local-dir DIR", "no network")  # fmt: skip
    refused("google/gemma-2-2b-it", *words)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(UserError) as error:
        hub.resolve("google/gemma-2-2b-it")
    assert "is set" not in str(error.value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("google/gemma-2-2b-it", *words, "HF_HUB_OFFLINE is set")
    assert {name for name, _ in asked} == {"google/gemma-2-2b-it"}


def test_a_cache_that_holds_only_the_tokenizer(tmp_path, monkeypatch):
    answer(monkeypatch, lambda name, **options: str(tmp_path))
    assert hub.resolve("google/gemma-2-2b-it", weights=False) == tmp_path
    refused("google/gemma-2-2b-it", "no weights as safetensors", "hf download google/gemma-2-2b-it")


def test_a_broken_connection_is_one_line(monkeypatch):
    broken = errors.HfHubHTTPError.__bases__[0]

    def cut(name: str, **options: Any) -> str:
        raise broken("peer closed the connection")

    answer(monkeypatch, cut)
    refused("google/gemma-2-2b-it", "not reachable", "peer closed")
