"""transformers' generate under torch on the same device, in the settings of `sampling.py` and in
bfloat16; beside the rows of sampler.json in the same folder, where there are any."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"  # the device's memory is torch's
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sampler"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sampler" / "workers"))

import numpy as np
from device import SETTINGS, Setting
from part import Report, commit, parser
from shapes import DRY_MODEL, DRY_SETTINGS

from grm_jax.model.config import ModelConfig, model_config


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", default="2b")
    options.add_argument("--new", type=int, default=128, help="tokens of a sample")
    options.add_argument("--repeats", type=int, default=2)
    told = options.parse_args()
    report = Report(told)
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        report.note(f"Not measured: {' and '.join(missing)} not installed.")
        return
    import torch
    import transformers

    if not told.dry and not torch.cuda.is_available():
        report.note(f"Not measured: torch {torch.__version__} is without CUDA here.")
        return
    where = torch.device("cpu" if told.dry else "cuda")
    config = DRY_MODEL if told.dry else model_config(told.size)
    settings, new = (DRY_SETTINGS, 8) if told.dry else (SETTINGS, told.new)
    model = random_model(config, where)
    report.about(
        device=where.type if told.dry else torch.cuda.get_device_name(),
        commit=commit(), torch=torch.__version__, transformers=transformers.__version__,
        attention=model.config._attn_implementation, new_tokens=new,
    )  # fmt: skip
    file = told.output.with_name("sampler.json")
    ours = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    for setting in report.while_time(settings):
        report.row(**measure(model, config, setting, new, told.repeats, where, ours))


def random_model(config: ModelConfig, where: Any) -> Any:
    """transformers' Gemma-2 of this shape, made on the device in bfloat16."""
    import torch
    import transformers

    from grm_jax.model.hf_config import config_json, special_ids

    content = config_json(config, num_labels=0, dtype="bfloat16", ids=special_ids(None))
    with where:
        return transformers.Gemma2ForCausalLM._from_config(
            transformers.Gemma2Config.from_dict(content), dtype=torch.bfloat16
        ).eval()


def measure(
    model: Any, config: ModelConfig, setting: Setting, new: int, repeats: int, where: Any, ours: Any
) -> dict[str, Any]:
    """One setting: the median of `repeats` runs after a first one."""
    import torch
    from hf import generate

    cuda = where.type == "cuda"
    ids = np.random.default_rng(0).integers(4, config.vocab_size, (setting.prompts, setting.prompt))
    row: dict[str, Any] = {**setting._asdict(), "tokens/s": None}
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        prompts, seconds = torch.as_tensor(ids, device=where), []
        for repeat in range(repeats + 1):
            started = time.perf_counter()
            drawn = generate(model, prompts, setting.k, new, repeat)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    except torch.OutOfMemoryError:
        return row | {"peak, GiB": "out of memory"}
    row["tokens/s"] = round(drawn / statistics.median(seconds[1:]), 1)
    for one in ours:
        if all(one[name] == value for name, value in setting._asdict().items()):
            row["grm_jax, tokens/s"] = one["tokens/s"]
            row["grm_jax is"] = f"{one['tokens/s'] / row['tokens/s']:.2f}x"
    if cuda:
        row["peak, GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row


if __name__ == "__main__":
    main()
