"""Programs of `experiments/gpu`, `claims` and `real_text` import each other by file names."""

from __future__ import annotations

import sys
from pathlib import Path

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path[:0] = [str(EXPERIMENTS / name) for name in ("gpu", "claims")]
sys.path.append(str(EXPERIMENTS / "real_text"))  # last: it has names such as `data`
