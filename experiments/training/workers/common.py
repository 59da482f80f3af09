"""What the workers of `bench.py` are told, and their batch; standard library and NumPy only."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "peers"))

from serve import serve as serve

ROWS, LENGTH, VOCABULARY = 8, 512, 32_000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--loss", choices=("sft", "grpo"), required=True)
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--device-batch", type=int, default=0, help="rows at a time; 0: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


def tokens() -> np.ndarray:
    """[ROWS, LENGTH] random token ids; every token but the first is learned."""
    return np.random.default_rng(0).integers(300, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)


def advantages() -> np.ndarray:
    return np.random.default_rng(1).normal(size=ROWS).astype(np.float32)
