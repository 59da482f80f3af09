"""Result files for the boards."""

from __future__ import annotations

import dataclasses
import json

from grm_jax.benchmarks.official import write_rewardbench
from grm_jax.benchmarks.rewardbench import BENCHMARK
from grm_jax.scoring.aggregate import aggregate


def test_rewardbenchs_two_files(tmp_path, record, row, figures_of):
    subsets = ("hep-go", "hep-go", "alpacaeval-easy", "alpacaeval-easy")
    records = [
        dataclasses.replace(record(f"r{i}", domain=subset), id=f"{subset}/{i}")
        for i, subset in enumerate(subsets)
    ]
    scores = ([9, 2], [3, 3], [1, 4], None)
    rows = [row(r.id, -1, s) for r, s in zip(records, scores, strict=True)]
    rules = BENCHMARK.authors
    (method,) = aggregate(records, rows).methods
    files = write_rewardbench(tmp_path, "org/judge", records, method, rules)
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [
        "eval-set/org_judge.json",
        "eval-set-scores/org_judge.json",
    ]
    grouped, columns = (json.loads(file.read_text()) for file in files)
    # A tie and an unreadable critique are 0.5, as in the authors' script.
    assert grouped == {
        "model": "org/judge", "model_type": "Generative RM", "chat_template": None,
        "alpacaeval-easy": 0.25, "hep-go": 0.75,
    }  # fmt: skip
    assert columns["results"] == [1, 0.5, 0, 0.5]
    assert columns["scores_chosen"] == [9, 3, 1, None]
    assert columns["scores_rejected"] == [2, 3, 4, None]
    assert columns["id"] == [0, 1, 2, 3] and columns["subset"] == list(subsets)
    assert columns["text_chosen"][0] == [
        {"role": "user", "content": "query r0"},
        {"role": "assistant", "content": "response 0"},
    ]
    # The file says what the table says.
    table = figures_of(BENCHMARK, records, method.credits(records, rules))
    assert {name: grouped[name] for name in table["subsets"]} == table["subsets"]
