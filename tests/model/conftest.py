"""Random tiny Gemma-2 models, in transformers and here, shared by this folder's tests.

transformers is imported once, and only by tests that ask for a reference model.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grm_jax.model import heads, huggingface, transformer
from grm_jax.model.config import ModelConfig
from grm_jax.model.hf_config import config_json, special_ids
from grm_jax.model.params import param_table

# In each: head_dim != embed_dim / num_heads, query_pre_attn_scalar != head_dim, fewer key/value
# heads than heads, a window shorter than the sequences. Small softcaps bend, large ones as in the
# published checkpoints must not.
SHAPES = {
    "wide-heads": ModelConfig(
        num_layers=4, embed_dim=48, num_heads=4, num_kv_heads=2, head_dim=16, hidden_dim=64,
        query_pre_attn_scalar=24, vocab_size=67, sliding_window=5, max_position=64,
    ),
    "one-kv-head": ModelConfig(
        num_layers=2, embed_dim=64, num_heads=8, num_kv_heads=1, head_dim=4, hidden_dim=40,
        query_pre_attn_scalar=10, vocab_size=50, sliding_window=3, max_position=64,
        attn_softcap=2.0, final_softcap=6.0, rope_theta=500.0,
    ),
    "six-layers": ModelConfig(
        num_layers=6, embed_dim=40, num_heads=4, num_kv_heads=2, head_dim=32, hidden_dim=52,
        query_pre_attn_scalar=144, vocab_size=80, sliding_window=7, max_position=64,
        norm_eps=1e-3,
    ),
    "like-27b": ModelConfig(
        num_layers=2, embed_dim=72, num_heads=6, num_kv_heads=3, head_dim=8, hidden_dim=96,
        query_pre_attn_scalar=12, vocab_size=61, sliding_window=2, max_position=64,
        attn_softcap=4.0,
    ),
}  # fmt: skip

PAD = 0  # never drawn as a token


@dataclasses.dataclass(frozen=True)
class Reference:
    """A model of transformers (eager, float32), its files, and the same parameters here."""

    model: Any
    directory: Path
    config: ModelConfig
    params: Any

    def logits(self, tokens: np.ndarray, **kwargs: np.ndarray) -> np.ndarray:
        """Logits of transformers [B, T, V] (or [B, C]) for tokens [B, T]."""
        import torch

        given = {name: torch.as_tensor(np.asarray(value)) for name, value in kwargs.items()}
        with torch.no_grad():
            return self.model(torch.as_tensor(tokens), **given).logits.float().numpy()


def _hf_config(config: ModelConfig, **changes: Any) -> Any:
    """transformers' config of a ModelConfig, written out by hand: independent of hf_config.py."""
    transformers = pytest.importorskip("transformers")
    return transformers.Gemma2Config(
        num_hidden_layers=config.num_layers,
        hidden_size=config.embed_dim,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.hidden_dim,
        query_pre_attn_scalar=int(config.query_pre_attn_scalar),
        vocab_size=config.vocab_size,
        sliding_window=config.sliding_window,
        max_position_embeddings=config.max_position,
        attn_logit_softcapping=config.attn_softcap,
        final_logit_softcapping=config.final_softcap,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.norm_eps,
        **changes,
    )


def randomize(model: Any, seed: int) -> None:
    """Random weights everywhere, norms too, large enough that softcaps and masks matter."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            std = (
                0.4
                if "norm" in name
                else 0.6
                if "embed" in name
                else 1.2 * weight[0].numel() ** -0.5
            )
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)


def make_reference(directory: Path, config: ModelConfig, num_labels: int = 0) -> Reference:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if num_labels:
        head, extra = transformers.Gemma2ForSequenceClassification, {"num_labels": num_labels}
    else:
        head, extra = transformers.Gemma2ForCausalLM, {}
    model = head._from_config(
        _hf_config(config, pad_token_id=PAD, **extra), attn_implementation="eager"
    ).eval()
    randomize(model, seed=config.embed_dim)
    model.save_pretrained(directory)
    loaded, params = huggingface.load(directory, num_labels=num_labels)
    assert loaded == config
    return Reference(model, directory, config, params)


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory):
    """name -> Reference of SHAPES[name]; each is made once."""

    @functools.cache
    def get(name: str) -> Reference:
        return make_reference(tmp_path_factory.mktemp(name), SHAPES[name])

    return get


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A Gemma2ForSequenceClassification with one label: a meta RM."""
    return make_reference(tmp_path_factory.mktemp("rm"), SHAPES["wide-heads"], num_labels=1)


@pytest.fixture(params=SHAPES)
def reference(request: pytest.FixtureRequest, references) -> Reference:
    return references(request.param)


@pytest.fixture(scope="session")
def wide(references) -> Reference:
    """One reference, where any shape will do."""
    return references("wide-heads")


@pytest.fixture
def hf_config():
    """(ModelConfig, **changes) -> transformers' Gemma2Config."""
    return _hf_config


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture(autouse=True)
def full_precision():
    """Products in true float32 on an accelerator too."""
    with jax.default_matmul_precision("highest"):
        yield


@functools.partial(jax.jit, static_argnums=1)
def _logits(params, config, tokens, positions, valid, segments):
    attend = transformer.self_attend(config, positions, valid=valid, segments=segments)
    hidden, _ = transformer.forward(params, config, tokens, positions, attend)
    return heads.logits(params, config, hidden)


@pytest.fixture(scope="session")
def our_logits():
    """(params, config, tokens [B, T], positions, valid, segments) -> logits [B, T, V].

    What is not given is filled in, so that tests with one batch shape share one compilation.
    """

    def run(params, config, tokens, positions=None, valid=None, segments=None) -> np.ndarray:
        if positions is None:
            positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        valid = np.ones(tokens.shape, bool) if valid is None else valid
        segments = np.zeros(tokens.shape, int) if segments is None else segments
        return np.asarray(_logits(params, config, tokens, positions, valid, segments))

    return run


@dataclasses.dataclass(frozen=True)
class Files:
    """A tiny checkpoint made without torch, and a way to spoil it."""

    directory: Path
    config: ModelConfig

    def read(self) -> dict[str, np.ndarray]:
        return load_file(self.directory / "model.safetensors")

    def write(self, tensors: dict[str, np.ndarray], name: str = "model.safetensors") -> None:
        save_file(tensors, self.directory / name, metadata={"format": "pt"})

    def edit_config(self, **changes: Any) -> None:
        """Set keys of config.json; a value of `...` removes the key."""
        path = self.directory / "config.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


@pytest.fixture
def files(tmp_path: Path, rng: np.random.Generator) -> Files:
    config = SHAPES["like-27b"]
    table = param_table(config)
    tensors = {
        name: rng.normal(size=spec.hf_shape).astype(np.float32)
        for spec in table
        for _, name in spec.hf_names()
    }
    found = Files(tmp_path / "hf", config)
    found.directory.mkdir()
    content = config_json(config, num_labels=0, dtype="float32", ids=special_ids(None))
    (found.directory / "config.json").write_text(json.dumps(content))
    found.write(tensors)
    return found
