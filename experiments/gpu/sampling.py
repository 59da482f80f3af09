"""The sampler with random weights: tokens/s, share of the memory's floor, peak memory, for some
prompt lengths, samples and numbers of prompts, as far as the time reaches."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sampler"))

import jax
from device import SETTINGS, DeviceBench
from part import Peak, Report, about_jax, parser
from shapes import DRY_MODEL, DRY_SETTINGS

from grm_jax.model.config import model_config
from grm_jax.sampler.options import EngineConfig


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", default="2b")
    options.add_argument("--new", type=int, default=128, help="tokens of a sample")
    options.add_argument("--repeats", type=int, default=3)
    told = options.parse_args()
    model = DRY_MODEL if told.dry else model_config(told.size)
    settings, new = (DRY_SETTINGS, 8) if told.dry else (SETTINGS, told.new)
    report = Report(told)
    peak = Peak(jax.devices()[0])
    bench = DeviceBench(model, EngineConfig())
    size = "toy" if told.dry else told.size
    report.about(**about_jax() | bench.about(), size=size, new_tokens=new)
    report.note(f"Weights alone: peak memory {peak.gib()} GiB while they are made.")
    for setting in report.while_time(settings):
        peak = Peak(jax.devices()[0])
        row = bench.measure(setting, new, told.repeats)
        report.row(**row, **{"peak, GiB": peak.gib()})


if __name__ == "__main__":
    main()
