"""TensorBoard's event files: scalars by step.

A file is a row of records (TFRecord). A record is an `Event` message of TensorBoard's event.proto
with its length, each with a checksum:

    length u64 | masked CRC-32C of it u32 | message | masked CRC-32C of it u32

Of the messages only what scalars need is written, so that training imports no package for it (those
that there are import torch or TensorFlow, which takes seconds):

    Event { 1: double wall_time  2: int64 step  3: string file_version  5: Summary  7: SessionLog }
    Summary { 1: repeated Value }   Value { 1: string tag  2: float simple_value }
    SessionLog { 1: enum status }
"""

from __future__ import annotations

import functools
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from grm_jax import files

_START = 1  # SessionLog.SessionStatus.START
# Of a field's key, beside its number: how the value is encoded.
_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5


class Board:
    """An event file, written by the thread that has the values.

    Args:
      resume_step: TensorBoard forgets what other files of the directory say of later steps.
    """

    def __init__(self, directory: Path, resume_step: int = 0):
        self._path = directory / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._file = self._path.open("ab")
        self._add(_field(3, b"brain.Event:2"))
        self._add(_field(2, resume_step + 1) + _field(7, _field(1, _START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of one step. Raises OSError when they can not be written."""
        rows = [_field(1, name.encode()) + _float(2, value) for name, value in values.items()]
        self._add(_field(2, step) + _field(5, b"".join(_field(1, row) for row in rows)))

    def _add(self, event: bytes) -> None:
        data = bytes([1 << 3 | _DOUBLE]) + struct.pack("<d", time.time()) + event
        size = struct.pack("<Q", len(data))
        with files.named(self._path):
            self._file.write(size + _checksum(size) + data + _checksum(data))
            self._file.flush()

    def close(self) -> None:
        with files.named(self._path):
            self._file.close()


def _field(number: int, value: int | bytes) -> bytes:
    """A field of a message: an integer of 0 or more, a string or another message."""
    if isinstance(value, int):
        return bytes([number << 3 | _VARINT]) + _varint(value)
    return bytes([number << 3 | _BYTES]) + _varint(len(value)) + value


def _float(number: int, value: float) -> bytes:
    with np.errstate(over="ignore"):  # beyond the range of float32: infinite
        return bytes([number << 3 | _FLOAT]) + np.asarray(value, "<f4").tobytes()


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@functools.cache
def _table() -> list[int]:
    """The remainder of each byte by the Castagnoli polynomial, reflected."""
    table = list(range(256))
    for _ in range(8):
        table = [(one >> 1) ^ (0x82F63B78 if one & 1 else 0) for one in table]
    return table


def _checksum(data: bytes) -> bytes:
    """CRC-32C, masked as TFRecord does: turned right by 15 bits, and a constant added."""
    table, crc = _table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)
