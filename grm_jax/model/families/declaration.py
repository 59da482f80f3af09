"""What a family of backbones declares: its features, its `config.json`, and its tensors' names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from grm_jax.model.shape import Kind, ModelConfig

# Parameter of a layer -> the name of the module, within the layer, that holds it in a checkpoint.
# What all families here have in common; a family adds its norms.
TENSORS: Mapping[str, str] = {
    "pre_attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS_AROUND: Mapping[str, str] = {
    **TENSORS,
    "post_attn_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Without norms behind attention and feed-forward, the second norm of a layer has this name.
NORMS_BEFORE: Mapping[str, str] = {**TENSORS, "pre_ffw_norm": "post_attention_layernorm"}


@dataclasses.dataclass(frozen=True)
class Missing:
    """The default of a number without which a file is refused: only its owner can say which value
    is meant. The message names the one that transformers assumes."""

    assumed: int


@dataclasses.dataclass(frozen=True)
class Number:
    """A number of `config.json`.

    Attributes:
      field: the field of ModelConfig that it sets.
      key: its key in the file.
      kind: int or float.
      default: its value where the key is absent: a number, a function of the file's content, or
        `Missing`. If it is None, the key may also be null, which means none.
      optional: null means none, whatever an absent key means.
    """

    field: str
    key: str
    kind: type
    default: float | Missing | Callable[[Mapping[str, Any]], Any] | None
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """A multimodal checkpoint around a family's text model, of which only the text part is read.

    Attributes:
      model_type: the `model_type` of its `config.json`, in which `text_config` is the text model's.
      architecture: the name of its class in `architectures`.
      prefixes: how the names of the text model's tensors begin in its files, and what these begin
        with in a text model's own files. transformers has written more than one form.
      others: how the names of tensors of its other parts begin.
    """

    model_type: str
    architecture: str
    prefixes: tuple[tuple[str, str], ...]
    others: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of backbones.

    Attributes:
      name: its name, which is the `model_type` of its `config.json`.
      title: its name in texts.
      features: the fields of ModelConfig that are the same in all its checkpoints.
      numbers: the numbers of `config.json`, in the order in which they are written.
      thetas: the rotary base of each kind of layers where `config.json` does not say it. With
        "local" in it, the kinds have their own rotary embeddings.
      pattern: the kinds of layers where `config.json` does not list them. Where no layer is local,
        a file that lists local ones is refused.
      pattern_key: a key that transformers 4 wrote instead of a list: every how many-th layer is
        global.
      activation: its name in `config.json`, and the keys under which it is found, the first that
        is there.
      tied: whether the head is the embedding where `tie_word_embeddings` is absent.
      only: keys of what the forward pass does not implement, and the values that it allows. A key
        may be absent.
      written: more keys of an exported `config.json`.
      tensors: parameter of a layer -> module within the layer.
      language_model, classifier: the names of its classes in transformers.
      ids: bos, eos and pad token ids of an export without a tokenizer.
      sizes: the released sizes, by the names that this package gives them.
      wrapper: a multimodal checkpoint whose text model is of this family.
    """

    name: str
    title: str
    features: Mapping[str, Any]
    numbers: tuple[Number, ...]
    thetas: Mapping[Kind, float]
    pattern: tuple[Kind, ...]
    activation: tuple[str, tuple[str, ...]]
    tied: bool
    only: Mapping[str, tuple[Any, ...]]
    written: Mapping[str, Any]
    tensors: Mapping[str, str]
    language_model: str
    classifier: str
    ids: Mapping[str, Any]
    sizes: Mapping[str, ModelConfig]
    pattern_key: str | None = None
    wrapper: Wrapper | None = None


def shape_numbers(
    *,
    layers: Any,
    width: Any,
    heads: Any,
    kv_heads: Any,
    head_dim: Any,
    hidden: Any,
    vocab: Any,
) -> tuple[Number, ...]:
    """The numbers that set the sizes of the weights, each with the default of its key."""
    return (
        Number("num_layers", "num_hidden_layers", int, layers),
        Number("embed_dim", "hidden_size", int, width),
        Number("num_heads", "num_attention_heads", int, heads),
        Number("num_kv_heads", "num_key_value_heads", int, kv_heads),
        Number("head_dim", "head_dim", int, head_dim),
        Number("hidden_dim", "intermediate_size", int, hidden),
        Number("vocab_size", "vocab_size", int, vocab),
    )
