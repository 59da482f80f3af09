"""What a compiled program sends between devices, read from its text."""

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
    """Bytes of the results of each kind of collective in an HLO module's text, a device and call.

    What stands in a loop counts as often as the loop runs, where that can be read, and both
    branches of a condition count. A collective that is begun, carried on and ended in different
    places has one channel, and counts once.
    """
    bodies = _computations(text)
    entry = next(name for name, (first, _) in bodies.items() if first)
    totals = dict.fromkeys(KINDS, 0.0)
    _count(bodies, entry, 1.0, totals, set())
    return totals


def _computations(text: str) -> dict[str, tuple[bool, list[str]]]:
    """(is the entry, its lines) of each computation, by name."""
    found: dict[str, tuple[bool, list[str]]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            lines = []
            found[match.group(1)] = (line.startswith("ENTRY"), lines)
        else:
            lines.append(line)
    return found


def _count(bodies, name: str, times: float, totals: dict[str, float], seen: set[str]) -> None:
    for line in bodies[name][1]:
        kind = next((k for k in KINDS if f" {k}(" in line or f" {k}-start(" in line), None)
        if kind is not None:
            channel = _CHANNEL.search(line)
            if channel is None or channel.group(1) not in seen:
                totals[kind] += times * _result_bytes(line, kind)
            if channel is not None:
                seen.add(channel.group(1))
            continue
        repeat = _trips(bodies, line) if " while(" in line else 1.0
        for several, one in _CALL.findall(line):
            for called in (several or one).split(","):
                inner = called.strip().lstrip("%")
                if inner in bodies:
                    _count(bodies, inner, times * repeat, totals, seen)


def _trips(bodies, line: str) -> float:
    """How often a loop runs: as the compiler says, or what its condition counts up to; else 1."""
    told = _TRIPS.search(line)
    if told:
        return float(told.group(1))
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
