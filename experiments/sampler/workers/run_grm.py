"""This project's sampler."""

import importlib.metadata

import jax
from common import arguments, serve

from grm_jax.model.params import param_table
from grm_jax.model.storage import load_params, param_shardings, read_model_config
from grm_jax.parallel.host import use_huge_pages
from grm_jax.parallel.mesh import make_mesh
from grm_jax.sampler.engine import Sampler
from grm_jax.sampler.options import EngineConfig, SamplingConfig
from grm_jax.sampler.schedule import Request

use_huge_pages()  # as this project's commands do
args = arguments()
model = read_model_config(args.model).replace(compute_dtype=args.dtype or "float32")
mesh = make_mesh(1, 1, 1, jax.devices()[:1])
shardings = param_shardings(param_table(model), mesh)
_, params = load_params(args.model, shardings=shardings, dtype=model.compute_dtype)
engine = EngineConfig(max_rows=args.k, page=512, prefill_tokens=512, chunk=32)
sampler = Sampler(model, [model.vocab_size + 1], engine, mesh)
request = Request("prompt", tuple(args.ids), tuple(range(args.k)))


def run(seed: int) -> int:
    settings = SamplingConfig(temperature=1.0, max_new_tokens=args.new)
    found = list(sampler.sample(params, [request], settings, jax.random.key(seed)))
    return sum(len(sample.tokens) for sample in found)


serve(f"grm_jax, jax {importlib.metadata.version('jax')}", run)
