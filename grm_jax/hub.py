"""Finds a model or tokenizer by a path, a folder of the Hugging Face hub's cache, or a repo id.

    resolve("models/2b")                          the path, `~` expanded
    resolve("models--google--gemma-2-2b-it")      its snapshot (the layout of the hub's cache)
    resolve("google/gemma-2-2b-it")               downloaded, or from the cache (HF_HUB_OFFLINE)

What looks like a local path is never asked of the hub.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import cast

from grm_jax import files
from grm_jax.errors import UserError

# The files of a tokenizer; the last two are small and say which ids end a text.
TOKENIZER_PATTERNS = (
    "tokenizer*.json",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "additional_chat_templates/*",
    "generation_config.json",
    "config.json",
)
# Weights as safetensors or as this package writes them. Pickles can run code: not downloaded.
MODEL_PATTERNS = (
    *TOKENIZER_PATTERNS,
    "model*.safetensors",
    "model.safetensors.index.json",
    "model.json",
    "params/*",
    "grm.json",
)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_CACHED = re.compile(r"models--.+")


def resolve(name: str | Path, kind: type[UserError] = UserError, *, weights: bool = True) -> Path:
    """The file or folder to which `name` refers.

    Args:
      name: a path, a folder of the hub's cache, or a repo id such as `google/gemma-2-2b-it`.
      kind: the class of the exception to raise.
      weights: False downloads only the files of a tokenizer.

    Raises `kind` when nothing is found, when a cache folder holds no snapshot or several, and when
    a repo can not be downloaded; the message says what to do.
    """
    path = files.expanded(name)
    if path.is_dir():
        return _snapshot(path, kind)
    if files.there(path):
        files.require_content(path, kind)
        if weights:
            raise kind(f"{path}: a file; give the directory of the model that it is part of")
        return path
    if not _may_be_repo(str(name)):
        wanted = "directory; give a folder that holds a model"
        if not weights:
            wanted = "file or directory; give a checkpoint directory or a *.model file"
        raise kind(
            f"{name}: no such {wanted}, or a repo id of the Hugging Face hub such as "
            "google/gemma-2-2b-it"
        )
    return _download(str(name), weights, kind)


def _may_be_repo(name: str) -> bool:
    """Whether a name may be a repo id: it has the form OWNER/NAME, and OWNER is no local folder."""
    if not _REPO_ID.fullmatch(name) or ".." in name or "--" in name:
        return False
    return not Path(name).parent.exists()


def _snapshot(path: Path, kind: type[UserError]) -> Path:
    """The snapshot of a folder of the hub's cache; any other folder is itself."""
    if _is_cached_repo(path):
        path = path / "snapshots"
    elif _CACHED.fullmatch(path.name) and (path / "blobs").is_dir():
        raise kind(f"{path}: holds no snapshot; its download did not end. Download it again")
    if not (path.name == "snapshots" and _is_cached_repo(path.absolute().parent)):
        _refuse_whole_cache(path, kind)
        return path
    snapshots = sorted(p for p in path.iterdir() if p.is_dir())
    if not snapshots:
        raise kind(f"{path}: holds no snapshot; its download did not end. Download it again")
    if len(snapshots) > 1:
        main = path.parent / "refs" / "main"
        newest = f" (main is {files.read_text(main, kind).strip()})" if main.is_file() else ""
        raise kind(
            f"{path}: holds {len(snapshots)} snapshots{newest}; give one of them: "
            f"{', '.join(str(p) for p in snapshots)}"
        )
    return snapshots[0]


def _is_cached_repo(path: Path) -> bool:
    """Whether a folder has the layout of a repo in the hub's cache, under any name."""
    if not (path / "snapshots").is_dir():
        return False
    return _CACHED.fullmatch(path.name) is not None or all(
        (path / part).is_dir() for part in ("blobs", "refs")
    )


def _refuse_whole_cache(path: Path, kind: type[UserError]) -> None:
    for folder in (path, path / "hub"):
        if not folder.is_dir() or (path / "config.json").exists():
            continue
        repos = sorted(str(p) for p in folder.iterdir() if _CACHED.fullmatch(p.name) and p.is_dir())
        if repos and not any(p.is_file() and p.suffix == ".json" for p in folder.iterdir()):
            raise kind(
                f"{path}: a cache of the Hugging Face hub with {len(repos)} models; give one of "
                f"them: {', '.join(repos[:20])}"
            )


def _download(name: str, weights: bool, kind: type[UserError]) -> Path:
    try:
        folder = _fetch(name, weights)
    except _Unreachable as error:
        raise kind(str(error)) from error
    if weights and not any(
        files.there(folder / weight_file)
        for weight_file in ("model.safetensors", "model.safetensors.index.json", "model.json")
    ):
        raise kind(
            f"{name}: {folder} holds no weights as safetensors (the repo has none, or only a part "
            f"of it was downloaded); save them as safetensors, or complete the folder with `hf "
            f"download {name}` where there is a network"
        )
    return folder


class _Unreachable(Exception):
    """A repo could not be downloaded; the message is for the user."""


@functools.lru_cache(maxsize=32)
def _fetch(name: str, weights: bool) -> Path:
    """Download a repo, once per process. Raises _Unreachable."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    # A download that breaks off in the middle of a file raises an error of the HTTP library, which
    # depends on the version of huggingface_hub. These errors are the bases of HfHubHTTPError.
    broken = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    patterns = MODEL_PATTERNS if weights else TOKENIZER_PATTERNS
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise _Unreachable(
            f"{name}: not a folder, and its repo on the Hugging Face hub asks for consent; accept "
            "its terms on its page there and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise _Unreachable(
            f"{name}: not a folder, and there is no such repo on the Hugging Face hub that you "
            "may read; correct the name, or log in with `hf auth login`"
        ) from error
    except (OSError, HFValidationError, *broken) as error:
        set_to = os.environ.get("HF_HUB_OFFLINE", "").upper()
        offline = " (HF_HUB_OFFLINE is set)" if set_to in ("1", "ON", "YES", "TRUE") else ""
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise _Unreachable(
            f"{name}: not a folder and not reachable on the Hugging Face hub{offline}; where "
            f"there is a network, `hf download {name}` fills {_cache_folder(name)}: copy that "
            f"folder here, or add --local-dir DIR and give DIR ({lines[0]})"
        ) from error


def _cache_folder(name: str) -> Path:
    """Where the hub's cache keeps a repo."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
