"""Locates a benchmark's files: given, among others, in a run, or on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, overload

from grm_jax import files
from grm_jax.data.rows import DataError
from grm_jax.scoring.benchmark import Benchmark


@overload
def locate(
    benchmark: Benchmark, data: Path | None, model: Path | None, *, strict: Literal[True] = True
) -> Path: ...
@overload
def locate(
    benchmark: Benchmark, data: Path | None, model: Path | None, *, strict: bool
) -> Path | None: ...
def locate(
    benchmark: Benchmark, data: Path | None, model: Path | None, *, strict: bool = True
) -> Path | None:
    """The file or directory that holds a benchmark.

    Args:
        data: the benchmark's file or directory, or a directory that holds its folder under one of
            the names in `Source.folders`. None: for the embedded world the run to which the model
            belongs, for other benchmarks the hub.
        strict: False returns None unless `data` is a directory that holds the benchmark's folder.

    Raises:
        DataError: the files are not found; the message says what to download.
    """
    source = benchmark.source
    if data is not None:
        data = files.expanded(data)
        if data.is_dir():
            folder_names = {name.lower() for name in source.folders}
            for folder in sorted(data.iterdir()):
                if folder.is_dir() and folder.name.lower() in folder_names:
                    return folder
        return data if strict else None
    if benchmark.name == "synthetic":
        start = model or Path("runs/tiny")
        for folder in (start, *start.parents):
            if (folder / "world").is_dir():
                return folder / "world"
    if not source.hub:
        raise DataError("data", "not given", f"{source.get}: --data PATH", benchmark.name)
    return _download(benchmark)


def _download(benchmark: Benchmark) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    source = benchmark.source
    try:
        return Path(
            snapshot_download(
                source.hub, repo_type="dataset", allow_patterns=list(source.patterns) or None
            )
        )
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        short = str(error).strip().splitlines()[0]
        raise DataError(
            "data",
            f"not given, and {source.hub} can not be downloaded: {short}",
            f"{source.get}: --data PATH",
            benchmark.name,
        ) from error
