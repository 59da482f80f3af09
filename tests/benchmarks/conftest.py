"""Figures of credits that a test chooses."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def figures_of():
    """(benchmark, records, credit by record id) -> its figures of credits, by group and name."""

    def compute(benchmark, records, credits):
        values = {"credit": np.asarray([[credits[record.id]] for record in records], float)}
        once, nested = np.ones((1, len(records))), {}
        for figure in benchmark.figures(records, benchmark.authors):
            nested.setdefault(figure.group, {})[figure.name] = float(figure.bind(values)(once)[0])
        return nested

    return compute
