"""The parts of `day.py`, in the order in which they run: the most valuable first.

Another part is another line. Its command is a Python program, which is also given `--output FILE`,
`--seconds NUMBER` and, in a dry run, `--dry`; `part.py` reads these and writes the rows.
"""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """One part of the day.

    Attributes:
      name: the name of its files; `--only` chooses parts by the beginning of their names.
      title: the heading of its table. Parts with the same title share one.
      command: a file beside this one and its arguments.
      seconds: the most that it may take.
      least: with less time left than this it is not begun.
    """

    name: str
    title: str
    command: tuple[str, ...]
    seconds: float
    least: float


UPDATES = "Gradient steps"


def _update(name: str, seconds: float, *arguments: str) -> Part:
    return Part(f"train-{name}", UPDATES, ("updates.py", *arguments), seconds, 35)


PARTS = (
    Part("device", "The device", ("ceilings.py",), 60, 20),
    Part("tests", "Tests that need a GPU", ("marked_tests.py",), 100, 30),
    Part("parity", "Parity with float32 on the CPU", ("parity.py",), 120, 40),
    Part("sampler", "Sampler", ("sampling.py", "--size", "2b"), 200, 60),
    _update("sft-chunked", 80, "--loss", "sft", "--attention", "chunked"),
    _update("grpo-chunked", 80, "--loss", "grpo", "--attention", "chunked"),
    _update("sft-tokamax", 80, "--loss", "sft", "--attention", "tokamax"),
    _update("grpo-tokamax", 80, "--loss", "grpo", "--attention", "tokamax"),
    Part("transformers", "transformers' generate", ("hf_sampling.py", "--size", "2b"), 90, 45),
    _update("sft-9b-lora", 90, "--loss", "sft", "--size", "9b", "--lora-rank", "16"),
    _update("grpo-9b-lora", 90, "--loss", "grpo", "--size", "9b", "--lora-rank", "16"),
    _update("sft-reference", 60, "--loss", "sft", "--attention", "reference"),
    Part("road", "The whole pipeline on the embedded world", ("road.py",), 420, 90),
)
