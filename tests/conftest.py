"""JAX for the whole suite: the CPU unless asked otherwise, as four devices; small models."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

# What one test has compiled, others find: in this run those of the other worker and the commands
# that tests start, too, and in later runs all. `--cache-clear` deletes it.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(os.path.dirname(os.path.dirname(__file__)), ".pytest_cache", "d", "programs"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Programs here run for microseconds: what takes time is to compile them. The first flag halves
    # that, and the others halve it again; XLA ends the process if it does not know a flag.
    flags = ["--xla_backend_optimization_level=0"]
    if version("jaxlib").startswith("0.10."):
        flags += ["--xla_cpu_use_fusion_emitters=false"]
        flags += ["--xla_cpu_parallel_codegen_split_count=1"]
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings

from grm_jax.data.critiques import Critique
from grm_jax.data.preferences import Preference
from grm_jax.model.config import ModelConfig
from grm_jax.model.params import Params, ParamSpec, build_tree, param_table
from grm_jax.parallel.mesh import make_mesh

jax.config.update("jax_num_cpu_devices", 4)
# Several programs in flight on virtual devices can wait for each other's threads.
jax.config.update("jax_cpu_enable_async_dispatch", False)

# Property tests draw the same examples in every run and write no database.
settings.register_profile("repeatable", deadline=None, database=None, derandomize=True)
settings.register_profile("search", deadline=None, database=None, max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


# Files whose tests take longest, longest first. Workers take files in this order, so that none of
# them begins with a long one when the others are done.
LONGEST = (
    "experiments/test_day.py", "training/test_pipeline.py", "training/test_meshes.py",
    "training/test_processes.py", "training/test_step.py", "scoring/test_sampling.py",
    "sampler/test_engine.py", "judge/test_transformers_pair.py", "model/test_bfloat16.py",
    "test_startup.py", "sampler/test_session.py", "planning/test_plan.py",
    "model/test_shared_prefix.py", "model/test_lora.py", "serving/test_real.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist would begin with many short tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        file = item.path.as_posix()
        ends = (i for i, name in enumerate(LONGEST) if file.endswith(f"tests/{name}"))
        return next(ends, len(LONGEST))

    items.sort(key=place)


@pytest.fixture(autouse=True)
def no_log_to_closed_streams() -> Iterator[None]:
    """A command logs to the standard output of its test, which is closed when the test ends."""
    yield
    root = logging.getLogger()
    for handler in [one for one in root.handlers if type(one) is logging.StreamHandler]:
        root.removeHandler(handler)


# A window shorter than the prompts, grouped queries, a scale that is not head_dim's, two blocks.
SMALL = ModelConfig(
    num_layers=4,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=48,
    query_pre_attn_scalar=12,
    vocab_size=40,
    sliding_window=6,
    max_position=96,
    attn_softcap=8.0,
    final_softcap=10.0,
)


def random_params(config: ModelConfig, seed: int, num_labels: int = 0) -> Params:
    """Parameters whose norms and scalar head are not zero either.

    Layers write into the residual stream with five times the usual weight: otherwise the tied
    embedding makes a random model repeat its input, and caches and masks hardly matter.
    """
    rng = np.random.default_rng(seed)

    def leaf(spec: ParamSpec) -> jax.Array:
        noise = rng.normal(size=spec.shape) * (1.5 * spec.init_std or 0.2)
        if spec.path[-1] in ("post_attn_norm", "post_ffw_norm"):
            noise += 4.0
        noise += spec.constant
        return jnp.asarray(noise, jnp.float32)

    return build_tree(param_table(config, num_labels=num_labels), leaf)


@pytest.fixture(scope="session")
def small() -> ModelConfig:
    return SMALL


@pytest.fixture(scope="session")
def small_params() -> Params:
    return random_params(SMALL, 0)


@pytest.fixture(scope="session")
def make_params():
    """(config, seed, num_labels=0) -> random parameters."""
    return random_params


@pytest.fixture(scope="session")
def one_device():
    """A mesh of one device."""
    return make_mesh(1, 1, 1, jax.devices()[:1])


@pytest.fixture(scope="session")
def mesh_of():
    """(replica, fsdp, tensor) -> a mesh of the first so many devices."""

    def make(replica: int, fsdp: int, tensor: int):
        count = replica * fsdp * tensor
        if len(jax.devices()) < count:
            pytest.skip(f"needs {count} devices, have {len(jax.devices())}")
        return make_mesh(replica, fsdp, tensor, jax.devices()[:count])

    return make


@pytest.fixture
def cpus() -> list[Any]:
    """Four CPU devices."""
    found = jax.devices("cpu")
    if len(found) < 4:
        pytest.skip("needs 4 CPU devices")
    return found[:4]


# Records and samples made by hand.


def make_record(
    id: str, n: int = 2, *, best: int = 0, domain: str = "", label: float = 1.0, **more
):
    """n responses of which `best` is the best; a single one has `label`."""
    return Preference(
        id=id,
        turns=({"role": "user", "content": more.pop("query", f"query {id}")},),
        responses=tuple(f"response {i}" for i in range(n)),
        labels=(label,) if n == 1 else tuple(float(i == best) for i in range(n)),
        domain=domain,
        **more,
    )


def make_row(id: str, sample: int, scores: Sequence[float] | None, n: int = 2, **more) -> Critique:
    """A sample; without scores it failed with `no_box`."""
    return Critique(
        example_id=id,
        sample=sample,
        order=tuple(range(n if scores is None else len(scores))),
        scores=None if scores is None else tuple(map(float, scores)),
        failure="no_box" if scores is None else None,
        finish_reason=more.pop("finish_reason", "stop"),
        **more,
    )


@pytest.fixture
def record():
    return make_record


@pytest.fixture
def row():
    return make_row
