"""Programs of `experiments/gpu`, `claims` and `real_text` import each other by file names; what the
claims are read from."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from grm_jax.critique import orders
from grm_jax.data.critiques import Critique
from grm_jax.data.preferences import Preference

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path[:0] = [str(EXPERIMENTS / name) for name in ("gpu", "claims")]
sys.path.append(str(EXPERIMENTS / "real_text"))  # last: it has names such as `data`


@pytest.fixture
def drawn():
    """(records, 8 critiques of each, scalar scores): random ones; some critiques have no scores."""
    rng = np.random.default_rng(0)
    records, rows, scalar = [], [], {}
    for index in range(40):
        n = 2 + index % 3
        labels = tuple(float(i == index % n) for i in range(n))
        turns = ({"role": "user", "content": "q"},)
        record = Preference(f"r{index}", turns, tuple("abcd"[:n]), labels)
        records.append(record)
        scalar[record.id] = rng.normal(size=n).tolist()
        for sample, order in enumerate(orders(n, 8, seed=index)):
            failed = rng.random() < 0.1 or index == 0
            rows.append(
                Critique(
                    record.id, sample, order,
                    None if failed else tuple(rng.integers(1, 6, n).astype(float).tolist()),
                    "no_box" if failed else None, "stop", meta=None if failed else rng.normal(),
                )
            )  # fmt: skip
    return records, rows, scalar
