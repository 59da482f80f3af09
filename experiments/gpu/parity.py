"""What the device computes beside float32 on the CPU of the same machine: every attention backend
with heads of 256, softcap and window, forward and backward; the model's log-probabilities and
gradients; and samples, whose log-probabilities the CPU computes again.

An error is the largest difference over the largest value of the CPU (of gradients: the norm of the
difference over the norm), of log-probabilities the largest difference. In float32 the bound is
fixed. In bfloat16 it is twice the error that bfloat16 has on the CPU with the reference backend:
that is due to the dtype, and not to the device. Exit code 1 if an error is above its bound.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sampler"))

import jax
import jax.numpy as jnp
import numpy as np
from device import random_params
from part import Report, about_jax, parser
from shapes import DRY_MODEL

from grm_jax.errors import UserError
from grm_jax.model.attention import Places
from grm_jax.model.attention_backends import Backend, choose, self_attention
from grm_jax.model.batch import completion_logprobs
from grm_jax.model.config import SIZES, ModelConfig
from grm_jax.parallel.mesh import make_mesh
from grm_jax.sampler.engine import Sampler
from grm_jax.sampler.options import EngineConfig, SamplingConfig
from grm_jax.sampler.schedule import Request
from grm_jax.training.losses import sft_loss

BACKENDS: tuple[Backend, ...] = ("reference", "chunked", "tokamax", "splash")
ATTENTION_F32, MODEL_F32 = 1e-4, 2e-3  # bounds in float32
SOFTCAP = 50.0


class Sizes(NamedTuple):
    """Tokens and window of the attention rows; models by name, the tokens of their rows, and the
    page, prompt and new tokens of their samples."""

    length: int
    window: int
    models: dict[str, ModelConfig]
    tokens: int
    page: int
    prompt: int
    new: int


FULL = Sizes(
    1024, 300,
    {"2b, 4 layers": SIZES["2b"].replace(num_layers=4, sliding_window=96), "2b": SIZES["2b"]},
    128, 64, 100, 32,
)  # fmt: skip
DRY = Sizes(64, 20, {"toy": DRY_MODEL}, 48, 48, 40, 6)


class Checks:
    """Rows of errors and their bounds."""

    def __init__(self, report: Report):
        self.report, self.count, self.bad = report, 0, 0

    def add(self, what: str, backend: str, dtype: Any, error: float, bound: float) -> None:
        good = bool(error <= bound)  # a NaN is not
        self.count, self.bad = self.count + 1, self.bad + (not good)
        self.report.row(
            what=what, backend=backend, dtype=jnp.dtype(dtype).name,
            error=float(f"{error:.3g}"), bound=float(f"{bound:.3g}"), good=good,
        )  # fmt: skip


def main() -> int:
    told = parser(__doc__).parse_args()
    sizes, report = DRY if told.dry else FULL, Report(told)
    report.about(**about_jax())
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    usable = usable_backends(report, device)
    checks = Checks(report)
    attention(checks, usable, sizes, device, cpu)
    for name in report.while_time(list(sizes.models)):
        model(checks, usable, name, sizes, device, cpu)
    print(f"{checks.bad} of {checks.count} checks are beyond their bounds")
    return int(checks.bad > 0)


def usable_backends(report: Report, device: Any) -> list[Backend]:
    """The backends that run on the device; notes say why others do not."""
    found: list[Backend] = []
    for name in BACKENDS:
        try:
            found.append(choose(name, device.platform, device.device_kind))
        except UserError as error:
            report.note(f"{name}: not compared: {error}.")
    return found


def attention(checks: Checks, usable: Sequence[Backend], sizes: Sizes, device: Any, cpu: Any):
    """Rows of several segments, and padding at their end, with scores up to the softcap."""
    rng = np.random.default_rng(0)
    batch, length, kv, group, head = 2, sizes.length, 2, 2, 256
    q = 6 * rng.normal(size=(batch, length, kv, group, head)) / 16
    k, v = rng.normal(size=(2, batch, length, kv, head))
    k *= 16 / head**0.5
    given = (q, k, v, rng.normal(size=q.shape))
    starts = np.array([[0, length // 3, length - 5], [0, length // 2, length - 9]])
    slots = np.broadcast_to(np.arange(length), (batch, length))
    segment = (slots[:, :, None] >= starts[:, None]).sum(-1) - 1
    position = slots - np.take_along_axis(starts, segment, axis=1)
    real = segment < 2

    def values(backend: Backend, window: int | None, dtype: Any, where: Any) -> list[np.ndarray]:
        """The output and the gradients of q, k and v in float32; the inputs are bfloat16's."""
        arrays = [jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in given]
        arrays, places, mask = jax.device_put(
            (arrays, (position, segment), real[:, :, None, None, None]), where
        )

        @jax.jit
        def compute(q, k, v, g, position, segment, mask):
            places = Places(position, position, segment, segment)
            run = self_attention(places, window=window, softcap=SOFTCAP, backend=backend)

            def total(q, k, v):
                out = jnp.where(mask, run(q, k, v), 0)
                return jnp.sum(out.astype(jnp.float32) * g.astype(jnp.float32)), out

            (_, out), grads = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
            return out, *grads

        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
            found = compute(*arrays, *places, mask)
        return [np.asarray(x.astype(jnp.float32)) for x in found]

    def error(found: list[np.ndarray], truth: list[np.ndarray]) -> tuple[float, float]:
        """Of the output, and the largest of the gradients."""
        each = [
            float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, truth, strict=True)
        ]
        return each[0], max(each[1:])

    for window in (None, sizes.window):
        truth = values("reference", window, jnp.float32, cpu)
        usual = error(values("reference", window, jnp.bfloat16, cpu), truth)
        for backend in usable:
            for dtype in (jnp.float32, jnp.bfloat16):
                if backend == "tokamax" and dtype == jnp.float32:
                    continue  # it computes in 16 bits alone
                found = error(values(backend, window, dtype, device), truth)
                for what, one, known in zip(("forward", "backward"), found, usual, strict=True):
                    bound = ATTENTION_F32 if dtype == jnp.float32 else 2 * known
                    shown = f"attention {what}, {f'window {window}' if window else 'no window'}"
                    checks.add(shown, backend, dtype, one, bound)


def model(
    checks: Checks, usable: Sequence[Backend], name: str, sizes: Sizes, device: Any, cpu: Any
) -> None:
    """Log-probabilities, gradients and samples of random weights."""
    shape, tokens = sizes.models[name], sizes.tokens
    params = varied(random_params(shape))
    rng = np.random.default_rng(1)
    learned = tokens // 2
    rows = rng.integers(4, shape.vocab_size, (2, tokens)).astype(np.int32)
    batch = {
        "tokens": rows,
        "lengths": np.array([tokens, tokens - 7], np.int32),
        "starts": np.full(2, tokens - learned, np.int32),
        "targets": rows[:, tokens - learned :],
        "mask": (np.arange(learned) < np.array([[learned], [learned - 7]])).astype(np.float32),
    }

    def values(config: ModelConfig, where: Any) -> tuple[np.ndarray, Any]:
        found = logprobs_and_gradients(*jax.device_put((params, batch), where), config)
        return np.asarray(found[0]), jax.device_put(found[1], cpu)

    exact = shape.replace(compute_dtype="float32", attention="reference")
    half = shape.replace(compute_dtype="bfloat16", attention="reference")
    truth = values(exact, cpu)
    usual = differences(values(half, cpu), truth, batch["mask"])
    for backend in usable:
        for config, bounds in ((exact, (MODEL_F32, MODEL_F32)), (half, [2 * u for u in usual])):
            if backend == "tokamax" and config is exact:
                continue
            found = values(config.replace(attention=backend), device)
            each = differences(found, truth, batch["mask"])
            for what, one, bound in zip(
                ("log-probabilities", "gradients"), each, bounds, strict=True
            ):
                checks.add(f"{name}: {what}", backend, config.compute_dtype, one, bound)
    for config, bound in ((exact, MODEL_F32), (half, 2 * usual[0])):
        on_device = functools.partial(sampled_difference, params, config, sizes, device)
        dtype = config.compute_dtype
        checks.add(f"{name}: samples beside float32 on the CPU", "sampler", dtype,
                   on_device(exact, cpu), bound)  # fmt: skip
        checks.add(f"{name}: samples beside the trainer on the device", "sampler", dtype,
                   on_device(config.replace(attention="chunked"), device), bound)  # fmt: skip


@jax.jit
def varied(params: Any) -> Any:
    """Random parameters in float32, norms that are not zero, and layers that write five times the
    usual into the residual stream: a random model otherwise repeats its input, and what attention
    does hardly matters."""

    def leaf(path: Any, w: jax.Array) -> jax.Array:
        name, w = path[-1].key, w.astype(jnp.float32)
        if name.endswith("norm"):
            w += 0.1 * jax.random.normal(jax.random.key(len(jax.tree_util.keystr(path))), w.shape)
        return w + 4.0 if name.startswith("post_") else w

    return jax.tree_util.tree_map_with_path(leaf, params)


@functools.partial(jax.jit, static_argnames="config")
def logprobs_and_gradients(params: Any, batch: Any, config: ModelConfig) -> tuple[Any, Any]:
    """The log-probabilities [B, C] of a collated batch, and the gradients of their mean."""
    precision = "highest" if config.compute_dtype == "float32" else "default"

    def loss(params: Any) -> tuple[Any, Any]:
        logprobs, _ = completion_logprobs(
            params, config, batch, temperature=1.0, remat="block", chunk=2048
        )
        total, count, _ = sft_loss(logprobs, batch["mask"])
        return total / count, logprobs

    with jax.default_matmul_precision(precision):
        (_, logprobs), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return logprobs, gradients


def differences(found: Any, truth: Any, mask: np.ndarray) -> tuple[float, float]:
    """Of log-probabilities the largest difference, of gradients that of the norms."""
    logprobs = float(np.abs((found[0] - truth[0]) * mask).max())
    pairs = list(zip(jax.tree.leaves(found[1]), jax.tree.leaves(truth[1]), strict=True))
    apart = sum(float(jnp.sum(jnp.square(a - b))) for a, b in pairs)
    return logprobs, (apart / sum(float(jnp.sum(jnp.square(b))) for _, b in pairs)) ** 0.5


def sampled_difference(
    params: Any, config: ModelConfig, sizes: Sizes, device: Any, other: ModelConfig, where: Any
) -> float:
    """The largest difference between a sample's log-probabilities on the device and those that
    `other` computes for its tokens as the trainer does."""
    engine = EngineConfig(max_rows=8, page=sizes.page, prefill_tokens=4 * sizes.page, chunk=8)
    precision = "highest" if config.compute_dtype == "float32" else "default"
    prompt = np.random.default_rng(2).integers(4, config.vocab_size, sizes.prompt).tolist()
    with jax.default_matmul_precision(precision):
        sampler = Sampler(config, [config.vocab_size + 1], engine, make_mesh(1, 1, 1, [device]))
        request = Request("prompt", tuple(prompt), (0, 1, 2))
        settings = SamplingConfig(max_new_tokens=sizes.new)
        samples = list(sampler.sample(params, [request], settings, jax.random.key(0)))
    rows = np.array([prompt + sample.tokens.tolist() for sample in samples], np.int32)
    count = len(rows)
    batch = {
        "tokens": rows,
        "lengths": np.full(count, rows.shape[1], np.int32),
        "starts": np.full(count, sizes.prompt, np.int32),
        "targets": rows[:, sizes.prompt :],
        "mask": np.ones((count, sizes.new), np.float32),
    }
    placed = jax.device_put((params, batch), where)
    expected, _ = logprobs_and_gradients(*placed, other)
    drawn = np.stack([sample.logprobs for sample in samples])
    return float(np.abs(drawn - np.asarray(expected)).max())


if __name__ == "__main__":
    sys.exit(main())
