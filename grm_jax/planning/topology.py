"""Devices that need not be there: a TPU slice to compile for on any machine, and GPUs by name.

Needs `libtpu` (pip install "grm_jax[tpu]"), whose compiler runs anywhere.
"""

from __future__ import annotations

import importlib.util
import os
import re
from typing import Any

from grm_jax.errors import UserError
from grm_jax.parallel.devices import DEVICES

# Names of TPU generations, as Cloud TPU and libtpu write them.
CHIPS = ("v4", "v5e", "v5p", "v6e")
_FORM = re.compile(r"(v\d+[a-z]*):(\d+(?:x\d+)+)")


class TopologyError(UserError):
    """A topology that can not be planned for; the message says what can."""


def prepare() -> None:
    """Make JAX run on the CPU, and keep libtpu from looking for chips. To be called before JAX is
    used."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["JAX_PLATFORMS"] = "cpu"


def tpu_devices(name: str) -> list[Any]:
    """The devices of a slice such as `v5e:8x8` or `v5p:4x4x4`.

    Raises TopologyError for a name of another form, and when libtpu is not installed.
    """
    if _FORM.fullmatch(name) is None or name.partition(":")[0] not in CHIPS:
        raise TopologyError(
            f"--topology {name}: give a TPU slice, one of {', '.join(CHIPS)} and its shape, as in "
            "v5e:8x8 or v5p:4x4x4; or a GPU and how many, as in h100:8"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            "planning for a TPU needs its compiler, which runs on any machine: "
            'pip install "grm_jax[tpu]"'
        )
    import jax
    from jax.experimental import topologies

    # A chip is one device, as on a TPU VM; without this, the compiler takes a v4 chip for two.
    more = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise TopologyError(f"--topology {name}: libtpu does not know it: {error}") from error
    return list(topology.devices)


def gpu(name: str) -> tuple[str, int]:
    """("H100", 8) of `h100:8`. Raises TopologyError for a GPU that is not in the table."""
    gpu_name, _, count = name.partition(":")
    gpus = {kind.lower().replace(" ", "-"): kind for kind in DEVICES if "TPU" not in kind}
    if not count.isdigit() or int(count) < 1 or gpu_name.lower() not in gpus:
        raise TopologyError(
            f"--topology {name}: give a TPU slice, one of {', '.join(CHIPS)} and its shape, as in "
            f"v5e:8x8; or a GPU, one of {', '.join(gpus)}, and how many, as in h100:8"
        )
    return gpus[gpu_name.lower()], int(count)


def stand_ins(count: int) -> list[Any]:
    """Virtual CPU devices in the place of GPUs: shapes and shardings are the same on them."""
    import jax

    jax.config.update("jax_num_cpu_devices", count)
    return list(jax.devices("cpu"))
