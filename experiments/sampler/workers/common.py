"""What the workers of `bench.py` are told; standard library only."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "peers"))

from serve import serve as serve


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default=None, help="this project: float32, bfloat16; a file's")
    found = parser.parse_args()
    found.ids = json.loads((found.model / "prompt.json").read_text())[: found.prompt]
    return found
