"""The fields of `config.json` that make a ModelConfig, read and written as a family declares them.

The layouts of transformers 4 (`rope_theta`, `rope_scaling`, `sliding_window_pattern`, `hidden_act`)
and of transformers 5 (`rope_parameters`, `layer_types`, `hidden_activation`) are both read. What is
written has both. A value that `model/transformer.py` does not implement is an error here; it is
never ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grm_jax.errors import UserError
from grm_jax.model.families import FAMILIES, Family, family_of
from grm_jax.model.families.declaration import Missing, Number
from grm_jax.model.shape import Kind, ModelConfig, RopeScaling

# What no family's forward pass implements: key -> the values that it allows.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
    "is_decoder": (True, False, None),
    "add_cross_attention": (False, None),
    "tie_word_embeddings": (True, False, None),
}
_LAYER_TYPES: Mapping[Kind, str] = {"local": "sliding_attention", "global": "full_attention"}
# The keys of a llama3 scaling, and the fields of RopeScaling.
_LLAMA3 = (
    ("factor", "factor"),
    ("low_freq_factor", "low_freq_factor"),
    ("high_freq_factor", "high_freq_factor"),
    ("original_max_position_embeddings", "original_max_position"),
)
_LONGEST_PATTERN = 12  # layers: a block is unrolled, so that a long one takes long to compile


class CheckpointError(UserError):
    """A model directory that can not be read or written as asked; the message names the file."""


def model_fields(path: Path, raw: dict[str, Any], family: Family) -> dict[str, Any]:
    """The fields of ModelConfig in a `config.json`, except the dtype.

    Args:
      path: the file, for messages.
      raw: its content, or that of its `text_config`.

    Raises CheckpointError for a field that is missing or has a value of another type, and for any
    value that the forward pass does not implement.
    """
    _refuse_unimplemented(path, raw, family)
    fields = dict(family.features)
    for number in family.numbers:
        fields[number.field] = _number(path, raw, number, family)
    fields.setdefault("query_pre_attn_scalar", fields["head_dim"])
    for field in ("attn_softcap", "final_softcap"):
        fields.setdefault(field, None)
    fields["pattern"] = _pattern(path, raw, family, fields["num_layers"])
    fields["tied_head"] = _tied(raw, family)
    ropes = _ropes(path, raw, family)
    fields["rope_theta"], fields["rope_scaling"] = ropes["global"]
    if "local" in family.thetas:
        fields["local_rope_theta"], fields["local_rope_scaling"] = ropes["local"]
    elif "local" in family.pattern:
        fields["local_rope_scaling"] = fields["rope_scaling"]
    return fields


def written_fields(config: ModelConfig) -> dict[str, Any]:
    """The keys of `config.json` that say what a model is, for transformers 4 and 5.

    Raises CheckpointError for a model that has other features than its family's checkpoints.
    """
    family = family_of(config)
    _require_family(config, family)
    written: dict[str, Any] = {"model_type": family.name}
    for number in family.numbers:
        value = getattr(config, number.field)
        # transformers declares some of them as integers, and version 5 refuses 256.0 there.
        whole = number.field == "query_pre_attn_scalar" and float(value).is_integer()
        written[number.key] = int(value) if whole else value
    name, _ = family.activation
    written |= {"hidden_act": name, "hidden_activation": name}
    if "local" in family.pattern:
        written["layer_types"] = [_LAYER_TYPES[kind] for kind in config.layer_kinds]
        regular = config.pattern[-1] == "global" and config.pattern.count("global") == 1
        if family.pattern_key is not None and regular:
            written[family.pattern_key] = len(config.pattern)
    written |= _written_ropes(config, family)
    return written | dict(family.written) | {"tie_word_embeddings": config.tied_head}


def family_by_type(path: Path, raw: dict[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family of a `config.json`, and the part of it that describes the text model.

    Raises CheckpointError, which lists the families, for any other `model_type`.
    """
    kind = raw.get("model_type")
    for family in FAMILIES.values():
        if kind == family.name:
            return family, raw
        if family.wrapper is not None and kind == family.wrapper.model_type:
            text = raw.get("text_config")
            if not isinstance(text, dict):
                raise CheckpointError(
                    f"{path}: text_config is {text!r:.60}; a {kind} has its text model's fields in "
                    "that object"
                )
            inner = text.get("model_type", family.name)
            if inner != family.name:
                raise CheckpointError(
                    f"{path}: text_config: model_type is {inner!r}, not {family.name!r}"
                )
            # What holds for the whole checkpoint stands outside.
            shared = {
                key: raw[key]
                for key in ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")
                if raw.get(key) is not None
            }
            return family, text | shared
    raise CheckpointError(
        f"{path}: model_type is {kind!r}; give a checkpoint of one of the families that are "
        f"implemented: {', '.join(known_types())}"
    )


def known_types() -> list[str]:
    """Every `model_type` that is read."""
    wrappers = [family.wrapper.model_type for family in FAMILIES.values() if family.wrapper]
    return [*FAMILIES, *wrappers]


def _require_family(config: ModelConfig, family: Family) -> None:
    """Raise CheckpointError unless the features of a model are those of its family."""
    usual = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    usual |= family.features
    fixed = ("norm_plus_one", "post_norms", "qk_norm", "qkv_bias", "activation", "embed_scale")
    wrong = {name: getattr(config, name) for name in fixed if getattr(config, name) != usual[name]}
    numbers = {number.field for number in family.numbers}
    if "attn_softcap" not in numbers:
        caps = {"attn_softcap": config.attn_softcap, "final_softcap": config.final_softcap}
        wrong |= {name: value for name, value in caps.items() if value is not None}
        if config.query_pre_attn_scalar != config.head_dim:
            wrong["query_pre_attn_scalar"] = config.query_pre_attn_scalar
    if "local" not in family.pattern and "local" in config.pattern:
        wrong["pattern"] = config.pattern
    one_rope = "local" not in family.thetas and "local" in config.kinds
    if one_rope and config.rope("local") != config.rope("global"):
        wrong["local_rope_theta"] = config.rope("local")
    if wrong:
        shown = ", ".join(f"{name}={value}" for name, value in wrong.items())
        raise CheckpointError(
            f"a {family.title} checkpoint can not say {shown}; correct the model's config, or give "
            "another family"
        )


def _refuse_unimplemented(path: Path, raw: dict[str, Any], family: Family) -> None:
    for key, allowed in {**_ONLY, **family.only}.items():
        if key in raw and raw[key] not in allowed:
            raise CheckpointError(
                f"{path}: {key} is {raw[key]!r}; the forward pass implements only "
                f"{' or '.join(repr(value) for value in allowed)}"
            )
    # The first key that is there counts, as in transformers.
    name, keys = family.activation
    key = next((key for key in keys if key in raw), None)
    if key is not None and raw[key] != name:
        raise CheckpointError(
            f"{path}: {key} is {raw[key]!r}; the forward pass of {family.title} implements only "
            f"{name!r}"
        )


def _number(path: Path, raw: dict[str, Any], number: Number, family: Family) -> Any:
    """The positive number of a key, or its default where it is absent; None for none."""
    key, kind = number.key, number.kind
    nothing = number.optional or number.default is None
    if key not in raw or (raw[key] is None and callable(number.default)):
        if isinstance(number.default, Missing):
            assumed = number.default.assumed
            raise CheckpointError(
                f"{path}: {key} is missing; transformers assumes {assumed} for {family.title}, so "
                f'add "{key}": {assumed}, or the value that the weights have'
            )
        if not callable(number.default):
            return number.default
        value = number.default(raw)
        if value is None:
            raise CheckpointError(f"{path}: {key} is missing; add the value that the weights have")
    else:
        value = raw[key]
    if value is None and nothing:
        return None
    return positive(path, key, value, kind)


def positive(path: Path, key: str, value: Any, kind: type) -> Any:
    """The value of a key, as `kind`. Raises CheckpointError unless it is a positive number."""
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise CheckpointError(
            f"{path}: {key} is {value!r}; the forward pass needs "
            f"{'an integer' if kind is int else 'a number'}"
        )
    if value <= 0:
        raise CheckpointError(f"{path}: {key} is {value!r}; it must be positive")
    return kind(value)


def _tied(raw: dict[str, Any], family: Family) -> bool:
    tied = raw.get("tie_word_embeddings")
    return family.tied if tied is None else tied


def _pattern(path: Path, raw: dict[str, Any], family: Family, layers: int) -> tuple[Kind, ...]:
    """The kinds of layers in a block: the shortest sequence whose repetition has all layers."""
    kinds = _layer_kinds(path, raw, family, layers)
    for size in range(1, min(layers, _LONGEST_PATTERN) + 1):
        if all(kind == kinds[index % size] for index, kind in enumerate(kinds)):
            return kinds[:size]
    raise CheckpointError(
        f"{path}: its local and global layers do not repeat after at most {_LONGEST_PATTERN} "
        "layers, which the forward pass needs"
    )


def _layer_kinds(path: Path, raw: dict[str, Any], family: Family, layers: int) -> tuple[Kind, ...]:
    """The kind of every layer: as listed, as `sliding_window_pattern` says, or the family's own."""
    names, key = raw.get("layer_types"), family.pattern_key
    if names is None:
        if key is None or raw.get(key) is None:
            size = len(family.pattern)
            return tuple(family.pattern[index % size] for index in range(layers))
        every = positive(path, key, raw[key], int)
        return tuple("local" if (index + 1) % every else "global" for index in range(layers))
    kinds: dict[str, Kind] = {"sliding_attention": "local", "full_attention": "global"}
    if not isinstance(names, list) or not all(name in kinds for name in names):
        raise CheckpointError(
            f"{path}: layer_types is {names!r:.120}; a list of {' and '.join(kinds)} is expected"
        )
    if len(names) != layers:
        raise CheckpointError(
            f"{path}: layer_types has {len(names)} entries for num_hidden_layers {layers}"
        )
    if "sliding_attention" in names and "local" not in family.pattern:
        raise CheckpointError(
            f"{path}: layer_types has sliding_attention; for {family.title} only full_attention is "
            "implemented"
        )
    return tuple(kinds[name] for name in names)


def _ropes(
    path: Path, raw: dict[str, Any], family: Family
) -> dict[Kind, tuple[float, RopeScaling | None]]:
    """The base and the scaling of the rotary embedding of global and of local layers."""
    new = raw.get("rope_parameters")
    old: dict[Kind, dict[str, Any]] = {"global": dict(_mapping(path, raw, "rope_scaling"))}
    if raw.get("rope_theta") is not None:
        old["global"].setdefault("rope_theta", raw["rope_theta"])
    old["local"] = {}
    if raw.get("rope_local_base_freq") is not None:
        old["local"]["rope_theta"] = raw["rope_local_base_freq"]
    given: dict[Kind, tuple[str, dict[str, Any]]] = {
        kind: ("rope_scaling", fields) for kind, fields in old.items()
    }
    if new is not None:
        fields = _mapping(path, raw, "rope_parameters")
        apart = "local" in family.thetas
        nested = any(name in fields for name in _LAYER_TYPES.values())
        if apart and not nested:
            raise CheckpointError(
                f"{path}: rope_parameters is {new!r}; {family.title} has full_attention and "
                "sliding_attention there, each with a rope_theta"
            )
        if nested and not apart:
            raise CheckpointError(
                f"{path}: rope_parameters is {new!r}; {family.title} has one rope_theta and one "
                "rope_type there"
            )
        given = {
            kind: (
                f"rope_parameters.{name}" if apart else "rope_parameters",
                dict(_mapping(path, fields, name) if apart else fields),
            )
            for kind, name in _LAYER_TYPES.items()
        }
        for kind, (_, own) in given.items():
            if "rope_theta" in old[kind]:
                own.setdefault("rope_theta", old[kind]["rope_theta"])
    found = {}
    for kind, theta in family.thetas.items():
        where, fields = given[kind]
        found[kind] = _rope(path, where, fields, theta)
        if raw.get("rope_scaling") is not None and new is not None and kind == "global":
            other = _rope(path, "rope_scaling", old[kind], theta)
            if other[1] != found[kind][1]:
                raise CheckpointError(
                    f"{path}: rope_scaling and rope_parameters differ; remove the one that is wrong"
                )
    return found


def _mapping(path: Path, raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path}: {key} is {value!r}; a JSON object is expected")
    return value


def _rope(
    path: Path, where: str, fields: dict[str, Any], theta: float
) -> tuple[float, RopeScaling | None]:
    """The base and the scaling in one object of rope_scaling or rope_parameters."""
    rest = dict(fields)
    kinds = [rest.pop(key) for key in ("rope_type", "type") if key in rest]
    kind = kinds[0] if kinds else "default"
    theta = positive(path, "rope_theta", rest.pop("rope_theta", theta), float)
    scaling = None
    if kind == "linear":
        factor = positive(path, f"{where}: factor", rest.pop("factor", None), float)
        scaling = RopeScaling("linear", factor)
    elif kind == "llama3":
        numbers = {
            field: positive(
                path, f"{where}: {key}", rest.pop(key, None), int if "max" in key else float
            )
            for key, field in _LLAMA3
        }
        try:
            scaling = RopeScaling("llama3", **numbers)
        except UserError as error:
            raise CheckpointError(f"{path}: {where}: {error}") from error
    elif kind != "default":
        raise CheckpointError(
            f"{path}: {where} is {fields!r}; only the rope_types default, linear and llama3 are "
            "implemented"
        )
    if rest:
        raise CheckpointError(f"{path}: {where} has {sorted(rest)}, not implemented")
    return theta, scaling


def _written_ropes(config: ModelConfig, family: Family) -> dict[str, Any]:
    parameters = {}
    for kind, name in _LAYER_TYPES.items():
        theta, scaling = config.rope(kind)
        parameters[name] = {"rope_theta": theta, **_written_scaling(scaling)}
    scaling = config.rope_scaling
    written: dict[str, Any] = {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else _written_scaling(scaling),
    }
    if "local" not in family.thetas:
        return written | {"rope_parameters": parameters["full_attention"]}
    local = config.rope("local")[0]
    return written | {"rope_local_base_freq": local, "rope_parameters": parameters}


def _written_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {"rope_type": "llama3"} | {key: getattr(scaling, field) for key, field in _LLAMA3}
