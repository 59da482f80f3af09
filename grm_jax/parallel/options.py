"""How devices are used, as options: needs no jax, so that commands start at once."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are used; one axis may be -1: what is left."""

    replica: int = 1
    """Data parallel with whole copies of the parameters."""
    fsdp: int = -1
    """Data parallel with the parameters split."""
    tensor: int = 1
    """Heads, feed-forward and vocabulary split."""
    sequence: int = 1
    """A row's tokens split between attention layers (its heads within them), for long rows;
    sequence * tensor must divide the key/value heads."""
    cpu_devices: int = 1
    """Virtual devices when running on a CPU; each uses about one core."""
