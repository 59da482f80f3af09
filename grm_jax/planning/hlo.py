"""The bytes that a compiled program sends between devices, read from its HLO text."""

from __future__ import annotations

import math
import re

KINDS: tuple[str, ...] = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALL = re.compile(
    r"(?:branch_computations|called_computations|calls)=\{([^}]*)\}"
    r"|(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"= s32\[\][^ ]* constant\((\d+)\)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def collective_bytes(text: str) -> dict[str, float]:
    """Bytes of the results of each kind of collective in an HLO module's text, for one device and
    one call of the program.

    A collective in a loop counts as often as the loop runs, if that can be read, and both branches
    of a condition count. A collective that is started, updated and finished in different places of
    the text has one channel, and counts once.
    """
    bodies = _computations(text)
    entry = next(name for name, (first, _) in bodies.items() if first)
    totals = dict.fromkeys(KINDS, 0.0)
    _count(bodies, entry, 1.0, totals, set())
    return totals


def _computations(text: str) -> dict[str, tuple[bool, list[str]]]:
    """(whether it is the entry, its lines) of each computation, by name."""
    computations: dict[str, tuple[bool, list[str]]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            lines = []
            computations[match.group(1)] = (line.startswith("ENTRY"), lines)
        else:
            lines.append(line)
    return computations


def _count(bodies, name: str, times: float, totals: dict[str, float], channels: set[str]) -> None:
    """Add the bytes of a computation that runs this many times; `channels` were counted already."""
    for line in bodies[name][1]:
        kind = next((k for k in KINDS if f" {k}(" in line or f" {k}-start(" in line), None)
        if kind is not None:
            channel = _CHANNEL.search(line)
            if channel is None or channel.group(1) not in channels:
                totals[kind] += times * _result_bytes(line, kind)
            if channel is not None:
                channels.add(channel.group(1))
            continue
        repeat = _trips(bodies, line) if " while(" in line else 1.0
        for several, one in _CALL.findall(line):
            for called in (several or one).split(","):
                inner = called.strip().lstrip("%")
                if inner in bodies:
                    _count(bodies, inner, times * repeat, totals, channels)


def _trips(bodies, line: str) -> float:
    """How often a loop runs: as the compiler notes, or the bound in its condition; otherwise 1."""
    trip_count = _TRIPS.search(line)
    if trip_count:
        return float(trip_count.group(1))
    condition = _CONDITION.search(line)
    if condition is None or condition.group(1) not in bodies:
        return 1.0
    bounds = [int(n) for text in bodies[condition.group(1)][1] for n in _CONSTANT.findall(text)]
    return float(max(bounds, default=1))


def _result_bytes(line: str, kind: str) -> float:
    """Bytes of a collective's result: the last array of a -start's tuple, else all of them."""
    result = line.split(" = ", 1)[1].split(f" {kind}", 1)[0]
    sizes = [
        _BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in _ARRAY.findall(result)
    ]
    if f" {kind}-start(" in line and len(sizes) > 1:
        return float(sum(sizes[len(sizes) // 2 :]))
    return float(sum(sizes))
