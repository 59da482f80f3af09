"""grm_jax: generative reward models with inference-time scaling (SPCT / DeepSeek-GRM) in JAX.

The paper is "Inference-Time Scaling for Generalist Reward Modeling", arXiv:2504.02495; equation
and section numbers in docstrings refer to it.
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`grm_jax.Judge`, when it is asked for: importing the package alone imports no JAX."""
    if name == "Judge":
        from grm_jax.judge.judge import Judge

        return Judge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
