"""What accelerators can do, by the names JAX gives them: for utilisation and for plans."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jax.sharding import Mesh


class Device(NamedTuple):
    """One device, from its maker's data sheet.

    Attributes:
      flops: dense bfloat16 FLOP/s.
      memory: bytes.
      bandwidth: bytes/s of its memory.
    """

    flops: float
    memory: float
    bandwidth: float


# Longer names first: the first that occurs in `device_kind` is taken.
DEVICES = {
    "TPU v5 lite": Device(197e12, 16 * 2**30, 819e9),
    "TPU v5e": Device(197e12, 16 * 2**30, 819e9),
    "TPU v5p": Device(459e12, 95 * 2**30, 2765e9),
    "TPU v5": Device(459e12, 95 * 2**30, 2765e9),
    "TPU v6 lite": Device(918e12, 32 * 2**30, 1640e9),
    "TPU v6e": Device(918e12, 32 * 2**30, 1640e9),
    "TPU v4": Device(275e12, 32 * 2**30, 1228e9),
    "GH200": Device(989e12, 96e9, 4000e9),
    "H200": Device(989e12, 141e9, 4800e9),
    "H100 PCIe": Device(756e12, 80e9, 2000e9),
    "H100": Device(989e12, 80e9, 3350e9),
    "B200": Device(2250e12, 180e9, 7700e9),
    "A100-SXM4-80GB": Device(312e12, 80e9, 2039e9),
    "A100": Device(312e12, 40e9, 1555e9),
    "L40S": Device(362e12, 48e9, 864e9),
    "L4": Device(121e12, 24e9, 300e9),
}


def find_device(kind: str) -> Device | None:
    """The device that JAX calls `kind`; None if it is not in the table (a CPU, say)."""
    return next((device for name, device in DEVICES.items() if name in kind), None)


def mesh_flops(mesh: Mesh) -> float | None:
    """FLOP/s of all devices of the mesh together; None if they are not in the table."""
    device = find_device(mesh.devices.flat[0].device_kind)
    return None if device is None else device.flops * mesh.size
