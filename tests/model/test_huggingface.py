"""Checkpoints in and out: round trips, shards, types, shardings, and errors that list names."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from grm_jax.errors import UserError
from grm_jax.model import huggingface
from grm_jax.model.huggingface import CheckpointError
from grm_jax.model.params import build_tree, get_leaf, param_table
from grm_jax.parallel import mesh

EMBED, NORM, UP = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.1.mlp.up_proj.weight",
)


def equal(a, b) -> None:
    """The same tree of the same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def all_tensors(directory) -> dict[str, np.ndarray]:
    found = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found


def same_tensors(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


# --- reading ---------------------------------------------------------------------------------


def test_each_tensor_lands_in_its_place(files):
    config, params = huggingface.load(files.directory)
    tensors = files.read()
    assert config == files.config
    for spec in param_table(config):
        for index, name in spec.hf_names():
            leaf = np.asarray(get_leaf(params, spec.path))
            leaf = leaf if index is None else leaf[index]
            want = tensors[name].T if spec.hf_transposed else tensors[name]
            assert (leaf.reshape(want.shape) == want).all(), name
    # Head n of the query projection is rows n*h .. (n+1)*h of Hugging Face's.
    q = np.asarray(params["blocks"]["global"]["q"])[0]
    h = config.head_dim
    stored = tensors["model.layers.1.self_attn.q_proj.weight"]
    assert (q[:, 2] == stored[2 * h : 3 * h].T).all()


def test_stored_rotary_frequencies_are_no_parameters(files):
    """The published files of Llama 2 hold them in every layer; they follow from config.json."""
    _, before = huggingface.load(files.directory)
    stored = files.read()
    for layer in range(files.config.num_layers):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        stored[name] = np.ones(files.config.head_dim // 2, np.float32)
    files.write(stored)
    _, after = huggingface.load(files.directory)
    equal(before, after)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("asked", [None, jnp.float32, "bfloat16"])
def test_types_in_memory(files, stored, asked):
    tensors = {name: value.astype(stored) for name, value in files.read().items()}
    files.write(tensors)
    _, params = huggingface.load(files.directory, dtype=asked)
    want = np.dtype(stored if asked is None else jnp.dtype(asked))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {want}
    assert (np.asarray(params["embed"]) == tensors[EMBED].astype(want)).all()
    up = params["blocks"]["global"]["up"][0]
    assert (np.asarray(up) == tensors[UP].T.astype(want)).all()


def test_layers_of_different_types_need_a_dtype(files):
    tensors = files.read()
    tensors[UP] = tensors[UP].astype(np.float16)
    tensors[NORM] = tensors[NORM].astype(ml_dtypes.bfloat16)  # on its own: fine
    tensors[UP.replace(".1.", ".0.")] = tensors[UP.replace(".1.", ".0.")].astype(np.float16)
    files.write(tensors)
    _, params = huggingface.load(files.directory)
    assert params["final_norm"].dtype == jnp.bfloat16
    assert params["blocks"]["local"]["up"].dtype == jnp.float16


def test_a_stack_of_mixed_types_is_an_error(wide, tmp_path):
    shutil.copy(wide.directory / "config.json", tmp_path)
    tensors = all_tensors(wide.directory)
    tensors["model.layers.3.mlp.up_proj.weight"] = tensors[
        "model.layers.3.mlp.up_proj.weight"
    ].astype(np.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"mlp.up_proj.weight is stored as .*F16.*F32.*dtype"):
        huggingface.load(tmp_path)
    _, params = huggingface.load(tmp_path, dtype=jnp.float32)
    assert params["blocks"]["global"]["up"].dtype == jnp.float32


def even_checkpoint(files):
    """A checkpoint in which four devices divide every dimension that the rules split."""
    config = files.config.replace(num_heads=8, num_kv_heads=4, vocab_size=64)
    table = param_table(config)
    rng = np.random.default_rng(0)
    params = build_tree(table, lambda spec: rng.normal(size=spec.shape).astype(np.float32))
    target = files.directory.parent / "even"
    huggingface.save(target, config, params)
    return config, table, params, target


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [((1, 4, 1), None), ((1, 1, 4), None), ((2, 1, 2), None), ((1, 2, 2), ml_dtypes.bfloat16)],
)
def test_sharded_reading_gives_the_same_parameters(files, cpus, sizes, dtype):
    config, table, params, target = even_checkpoint(files)
    found = mesh.make_mesh(*sizes, devices=cpus)
    shardings = build_tree(table, lambda spec: mesh.sharding(found, spec.axes))
    _, sharded = huggingface.load(target, shardings=shardings, dtype=dtype)
    for spec in table:
        assert get_leaf(sharded, spec.path).sharding == get_leaf(shardings, spec.path), spec.path
    equal(jax.tree.map(lambda x: x.astype(dtype or x.dtype), params), sharded)
    out = files.directory.parent / "out"
    huggingface.save(out, config, sharded)
    if dtype is None:
        same_tensors(all_tensors(target), all_tensors(out))


def test_one_process_reads_only_what_its_devices_hold(files, cpus, monkeypatch):
    """The reader asks the file for rows and columns of a shard, never for the whole tensor."""
    _, table, _, target = even_checkpoint(files)
    sizes: dict[tuple[str, ...], list[int]] = {}
    original = huggingface._part

    def spy(spec, tensor, index):
        class Counting:
            def __getitem__(self, wanted):
                read = tensor[wanted]
                sizes.setdefault(spec.path, []).append(read.size)
                return read

        return original(spec, Counting(), index)

    monkeypatch.setattr(huggingface, "_part", spy)
    found = mesh.make_mesh(1, 2, 2, cpus)
    shardings = build_tree(table, lambda spec: mesh.sharding(found, spec.axes))
    huggingface.load(target, shardings=shardings)
    for spec in table:
        shard = np.prod(get_leaf(shardings, spec.path).shard_shape(spec.shape)[int(spec.stacked) :])
        assert set(sizes[spec.path]) == {shard}, spec.path


# --- what is refused -------------------------------------------------------------------------


def test_missing_surplus_and_misshapen_tensors_are_listed(files):
    tensors = files.read()
    del tensors[NORM], tensors["model.layers.0.self_attn.q_proj.weight"]
    tensors["model.layers.2.input_layernorm.weight"] = np.zeros(72, np.float32)
    tensors[UP] = tensors[UP].T.copy()
    files.write(tensors)
    with pytest.raises(CheckpointError) as error:
        huggingface.load(files.directory)
    text = str(error.value)
    assert "2 missing: model.layers.0.self_attn.q_proj.weight, model.norm.weight" in text
    assert "1 surplus: model.layers.2.input_layernorm.weight" in text
    assert f"1 misshapen: {UP} (has [72, 96], wants [96, 72])" in text


def test_long_lists_are_cut(files):
    files.write({"other": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"24 missing: .* and 4 more"):
        huggingface.load(files.directory)


def test_unknown_number_types_are_refused(files):
    files.write(files.read() | {NORM: np.zeros(72, np.int8)})
    with pytest.raises(CheckpointError, match=r"not F32, BF16 or F16: model.norm.weight \(I8\)"):
        huggingface.load(files.directory)


def test_a_tied_head_may_be_stored_but_not_another(files):
    tensors = files.read()
    plain = huggingface.load(files.directory)[1]
    files.write(tensors | {"lm_head.weight": tensors[EMBED]})
    equal(plain, huggingface.load(files.directory)[1])
    other = tensors[EMBED].copy()
    other[-1, -1] += 1
    files.write(tensors | {"lm_head.weight": other})
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens"):
        huggingface.load(files.directory)
    files.write(tensors | {"lm_head.weight": tensors[EMBED][:-1]})
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs"):
        huggingface.load(files.directory)


def test_an_untied_head_is_read_and_written(files, tmp_path):
    tensors = files.read()
    files.edit_config(tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head.weight; tie_word_embeddings is"):
        huggingface.load(files.directory)
    tensors["lm_head.weight"] = tensors[EMBED] + 1
    files.write(tensors)
    config, params = huggingface.load(files.directory)
    assert not config.tied_head and (params["head"] == params["embed"] + 1).all()
    huggingface.save(tmp_path / "out", config, params)
    same_tensors(tensors, all_tensors(tmp_path / "out"))


def test_padded_vocabulary_is_not_cut_in_silence(files):
    tensors = files.read()
    tensors[EMBED] = np.pad(tensors[EMBED], ((0, 3), (0, 0)))
    files.write(tensors)
    with pytest.raises(CheckpointError, match=r"has 64 rows.*vocab_size 61.*first 61 rows only"):
        huggingface.load(files.directory)
    files.edit_config(vocab_size=64)
    assert huggingface.load(files.directory)[1]["embed"].shape == (64, 72)


def test_directories_that_hold_no_safetensors(files):
    weights = files.directory / "model.safetensors"
    assert huggingface.is_checkpoint_dir(files.directory)
    blob = weights.read_bytes()
    weights.write_bytes(blob[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a whole safetensors file"):
        huggingface.load(files.directory)
    weights.unlink()
    assert not huggingface.is_checkpoint_dir(files.directory)
    with pytest.raises(CheckpointError, match=r"has neither model.safetensors nor"):
        huggingface.load(files.directory)
    (files.directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pickled weights \(pytorch_model.bin\).*refused"):
        huggingface.load(files.directory)
    (files.directory / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="an adapter, not a model; merge it first"):
        huggingface.load(files.directory)
    with pytest.raises(CheckpointError, match="no such directory"):
        huggingface.load(files.directory / "nothing")


def test_spoilt_indexes(files):
    tensors, index = files.read(), files.directory / huggingface.INDEX
    half = dict(list(tensors.items())[:10])
    rest = {name: value for name, value in tensors.items() if name not in half}
    files.write(half, "model-00001-of-00002.safetensors")
    files.write(rest, "model-00002-of-00002.safetensors")
    where = {n: f"model-0000{1 if n in half else 2}-of-00002.safetensors" for n in tensors}
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(CheckpointError, match=r"has both model.safetensors and"):
        huggingface.load(files.directory)
    plain = files.directory / "model.safetensors"
    plain.rename(files.directory / "kept")
    sharded = huggingface.load(files.directory)[1]
    assert (np.asarray(sharded["embed"]) == tensors[EMBED]).all()
    files.write(rest | {EMBED: tensors[EMBED]} | half, "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="is in another shard too"):
        huggingface.load(files.directory)
    (files.directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not there: model-00002-of-00002.safetensors"):
        huggingface.load(files.directory)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        huggingface.load(files.directory)


# --- writing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("limit", [5e9, 60_000, 1])
def test_reading_then_writing_is_the_identity(files, stored, limit, tmp_path):
    tensors = {name: value.astype(stored) for name, value in files.read().items()}
    files.write(tensors)
    config, params = huggingface.load(files.directory)
    out = tmp_path / "out"
    huggingface.save(out, config, params, max_shard_bytes=limit)
    same_tensors(tensors, all_tensors(out))
    again, params_again = huggingface.load(out)
    equal(params, params_again)
    low = stored == ml_dtypes.bfloat16
    assert again == config.replace(dtype="bfloat16" if low else "float32")
    assert json.loads((out / "config.json").read_text())["dtype"] == np.dtype(stored).name


def test_a_tensor_larger_than_a_shard_has_its_own(files, tmp_path):
    """The others fill theirs as before, and config.json names the embedding's type all the same."""
    config, params = huggingface.load(files.directory)
    bytes_of = {name: t.nbytes for name, t in all_tensors(files.directory).items()}
    limit = sorted(set(bytes_of.values()))[-2]  # all fit but the largest kind
    params = params | {"embed": params["embed"].astype(ml_dtypes.bfloat16)}
    out = tmp_path / "out"
    huggingface.save(out, config, params, max_shard_bytes=limit)
    for path in out.glob("*.safetensors"):
        sizes = [t.nbytes for t in load_file(path).values()]
        assert sum(sizes) <= limit or len(sizes) == 1
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_and_their_index(files, tmp_path):
    config, params = huggingface.load(files.directory)
    out = tmp_path / "out"
    huggingface.save(out, config, params, max_shard_bytes=60_000)
    index = json.loads((out / huggingface.INDEX).read_text())
    paths = sorted(out.glob("*.safetensors"))
    count = len(paths)
    assert count > 2
    assert [p.name for p in paths] == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    tensors = files.read()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"] == {name: p.name for p in paths for name in load_file(p)}
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in paths]
    firsts = [max(t.nbytes for t in load_file(path).values()) for path in paths]
    for size, after, biggest in zip(sizes, sizes[1:], firsts[1:], strict=False):
        assert size <= 60_000 and after  # filled as far as the next tensor allowed:
        assert size + biggest > 60_000
    with safe_open(paths[0], framework="numpy") as handle:
        assert handle.metadata() == {"format": "pt"}  # transformers 4 refuses a file without
    assert not (out / "model.safetensors").exists()


def test_a_type_can_be_chosen(files, tmp_path):
    config, params = huggingface.load(files.directory)
    huggingface.save(tmp_path / "out", config, params, dtype="bfloat16")
    for name, value in all_tensors(tmp_path / "out").items():
        assert (value == files.read()[name].astype(ml_dtypes.bfloat16)).all()
    params["final_norm"] = params["final_norm"].at[3].set(1e6)
    with pytest.raises(CheckpointError, match=r"model.norm.weight: has values beyond float16's"):
        huggingface.save(tmp_path / "half", config, params, dtype=jnp.float16)
    assert not huggingface.is_checkpoint_dir(tmp_path / "half")  # no config.json: not a checkpoint
    with pytest.raises(CheckpointError, match="embed: can not be stored as float8"):
        huggingface.save(tmp_path / "eighth", config, params, dtype=jnp.float8_e4m3fn)


def test_parameters_that_do_not_fit_are_listed(files, tmp_path):
    config, params = huggingface.load(files.directory)
    params["blocks"]["local"]["q"] = params["blocks"]["local"]["q"][..., :4]
    params["blocks"]["global"]["bias"] = params.pop("final_norm")
    with pytest.raises(CheckpointError) as error:
        huggingface.save(tmp_path / "out", config, params)
    text = str(error.value)
    assert "1 missing: final_norm" in text and "1 surplus: blocks/global/bias" in text
    assert "misshapen: blocks/local/q (has [1, 72, 6, 4], wants [1, 72, 6, 8])" in text
    assert not (tmp_path / "out").exists()


def test_a_model_is_never_overwritten(files, tmp_path):
    config, params = huggingface.load(files.directory)
    with pytest.raises(UserError, match=r"already holds config.json, model.safetensors"):
        huggingface.save(files.directory, config, params)
    out = tmp_path / "out"
    out.mkdir()
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 107]}))
    huggingface.save(out, config, params, tokenizer_dir=out)  # a tokenizer may be there before
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [1, 107]
    with pytest.raises(CheckpointError, match="no such directory to copy a tokenizer from"):
        huggingface.save(tmp_path / "other", config, params, tokenizer_dir=tmp_path / "none")
    with pytest.raises(ValueError, match="max_shard_bytes=0; give a positive size"):
        huggingface.save(tmp_path / "other", config, params, max_shard_bytes=0)


def test_transformers_loads_what_is_written(wide, tmp_path, rng):
    """All keys matched, the same bits, the same logits; from shards, and in bfloat16."""
    import torch
    import transformers

    tokens = torch.as_tensor(rng.integers(1, wide.config.vocab_size, (2, 9)))
    huggingface.save(tmp_path / "out", wide.config, wide.params, max_shard_bytes=50_000)
    model, info = transformers.Gemma2ForCausalLM.from_pretrained(  # type: ignore[misc]
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, wide.model(tokens).logits)
    huggingface.save(tmp_path / "low", wide.config, wide.params, dtype=jnp.bfloat16)
    low = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "low")
    assert low.dtype == torch.bfloat16 and low.config.architectures == ["Gemma2ForCausalLM"]
    for name, value in low.state_dict().items():
        assert torch.equal(value, wide.model.state_dict()[name].bfloat16()), name


def test_scalar_head_round_trip(classifier, tmp_path, rng):
    import torch
    import transformers

    with pytest.raises(CheckpointError, match=r"width 1 .*, asked for 0; pass num_labels=1"):
        huggingface.load(classifier.directory)
    config, params = huggingface.load(classifier.directory, num_labels=None)
    assert params["score"].shape == (config.embed_dim, 1)
    huggingface.save(tmp_path / "out", config, params)
    same_tensors(all_tensors(classifier.directory), all_tensors(tmp_path / "out"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "Gemma2ForSequenceClassification"
    tokens = torch.as_tensor(rng.integers(1, config.vocab_size, (2, 9)))
    with torch.no_grad():
        theirs = classifier.model(tokens).logits
        torch.testing.assert_close(model(tokens).logits, theirs)
    spoilt = {n: t for n, t in all_tensors(tmp_path / "out").items() if n != "score.weight"}
    save_file(spoilt, tmp_path / "out" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: score.weight"):
        huggingface.load(tmp_path / "out", num_labels=1)
