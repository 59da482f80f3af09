"""The programs of `experiments/gpu` import each other by their file names."""

from __future__ import annotations

import sys
from pathlib import Path

GPU = Path(__file__).parents[2] / "experiments" / "gpu"
sys.path.insert(0, str(GPU))
