"""The convert command, end to end."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from grm_jax import convert
from grm_jax.errors import UserError
from grm_jax.model import huggingface, storage
from grm_jax.model.params import build_tree, param_table
from grm_jax.parallel import mesh


def run(command: str, source, target, *more: str) -> None:
    convert.main([command, "--input", str(source), "--output", str(target), *more])


def fails(capsys, *args) -> str:
    with pytest.raises(SystemExit) as error:
        run(*args)
    assert error.value.code not in (0, None)
    return f"{error.value.code}{capsys.readouterr().err}"


def add_tokenizer(directory) -> dict[str, str]:
    vocabulary = {
        "model": {"type": "WordLevel", "vocab": {"<pad>": 0, "<eos>": 1, "a": 2}},
        "added_tokens": [],
    }
    content = {
        "tokenizer.json": json.dumps(vocabulary),
        "tokenizer_config.json": json.dumps(
            {"eos_token": "<eos>", "pad_token": "<pad>", "tokenizer_class": "LlamaTokenizerFast"}
        ),
        "chat_template.jinja": "{{ messages }}",
    }
    for name, text in content.items():
        (directory / name).write_text(text)
    return content


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_import_then_export_is_bit_identical(files, tmp_path, stored, capsys):
    tensors = {name: value.astype(stored) for name, value in files.read().items()}
    files.write(tensors)
    files.edit_config(eos_token_id=[1, 7], dtype=np.dtype(stored).name)
    tokenizer = add_tokenizer(files.directory)
    native, out = tmp_path / "native", tmp_path / "out"
    run("import", files.directory, native)
    assert f"parameters, read as {np.dtype(stored).name}" in capsys.readouterr().out
    assert storage.is_model_dir(native) and not huggingface.is_checkpoint_dir(native)
    run("export", native, out)
    written = load_file(out / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        assert written[name].dtype == stored and written[name].tobytes() == value.tobytes(), name
    for directory in (native, out):
        assert {n: (directory / n).read_text() for n in tokenizer} == tokenizer
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((files.directory / "config.json").read_text()) | {
        "torch_dtype": np.dtype(stored).name
    }
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 2, "eos_token_id": [1, 7], "pad_token_id": 0}


def test_import_export_of_a_model_of_transformers(wide, tmp_path, rng):
    import torch
    import transformers

    run("import", wide.directory, tmp_path / "native")
    run("export", tmp_path / "native", tmp_path / "out", "--max-shard-size", "50KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    tokens = torch.as_tensor(rng.integers(1, wide.config.vocab_size, (2, 9)))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, wide.model(tokens).logits)


def test_a_meta_rm_and_chosen_types(classifier, tmp_path):
    run("import", classifier.directory, tmp_path / "native", "--dtype", "bfloat16")
    config, params = storage.load_model(tmp_path / "native")
    assert params["score"].dtype == jnp.bfloat16
    run("export", tmp_path / "native", tmp_path / "out", "--dtype", "float32")
    back_config, back = huggingface.load(tmp_path / "out", num_labels=1)
    assert (config.dtype, back_config.dtype) == ("bfloat16", "float32")
    assert back_config.replace(dtype="bfloat16") == config
    for a, b, original in zip(
        *map(jax.tree.leaves, (params, back, classifier.params)), strict=True
    ):
        assert b.dtype == jnp.float32 and (np.asarray(a).astype(np.float32) == np.asarray(b)).all()
        assert (np.asarray(original).astype(jnp.bfloat16) == np.asarray(a)).all()


def test_model_directory_on_a_mesh(files, tmp_path, cpus):
    config = files.config.replace(num_heads=8, num_kv_heads=4, vocab_size=64)
    table = param_table(config)
    rng = np.random.default_rng(0)
    params = build_tree(table, lambda spec: rng.normal(size=spec.shape).astype(np.float32))
    storage.save_model(tmp_path / "native", config, params)
    found = mesh.make_mesh(1, 2, 2, cpus)
    shardings = build_tree(table, lambda spec: mesh.sharding(found, spec.axes))
    loaded, sharded = storage.load_model(
        tmp_path / "native", dtype=jnp.bfloat16, shardings=shardings
    )
    assert loaded == config
    for x, y, where in zip(*map(jax.tree.leaves, (params, sharded, shardings)), strict=True):
        assert y.sharding == where and (x.astype(jnp.bfloat16) == np.asarray(y)).all()


def test_clear_errors(files, tmp_path, capsys):
    native = tmp_path / "native"
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    hf, full, out = files.directory, tmp_path / "full", tmp_path / "out"
    assert "exists and is not empty" in fails(capsys, "import", hf, full)
    assert "exists and is not empty" in fails(capsys, "import", hf, full / "notes.txt")
    assert "no such directory" in fails(capsys, "import", tmp_path / "no", out)
    assert "config.json: no such file" in fails(capsys, "import", tmp_path / "empty", out)
    assert "not a model directory (no model.json)" in fails(capsys, "export", full, out)
    assert "already is a Hugging Face directory; use `import`" in fails(capsys, "export", hf, out)
    assert "--dtype" in fails(capsys, "import", hf, out, "--dtype", "int8")
    assert not out.exists()
    run("import", hf, tmp_path / "empty")  # an empty directory will do
    run("import", hf, native)
    assert "already is a model directory; use `export`" in fails(capsys, "import", native, out)
    assert "is not a size; give one such as" in fails(
        capsys, "export", native, out, "--max-shard-size", "5 apples"
    )
    with pytest.raises(UserError, match="already holds a model"):
        storage.save_model(native, *huggingface.load(hf))
    about = json.loads((native / "model.json").read_text())
    (native / "model.json").write_text(json.dumps(about | {"format": "grm_jax-model-9"}))
    assert "format is 'grm_jax-model-9'" in fails(capsys, "export", native, out)
    about["config"]["head_dim"] = 16
    (native / "model.json").write_text(json.dumps(about))
    message = fails(capsys, "export", native, out)
    assert "params: " in message and "blocks/local/q" in message
    about["config"] |= {"head_dim": files.config.head_dim, "family": "gemma9"}
    (native / "model.json").write_text(json.dumps(about))
    message = fails(capsys, "export", native, out)
    assert "model.json: config.family is 'gemma9'; this version knows gemma2, gemma3" in message
    about["config"]["colour"] = 1
    (native / "model.json").write_text(json.dumps(about))
    assert "colour" in fails(capsys, "export", native, out)


def test_a_missing_tokenizer_is_said(files, tmp_path, capsys):
    run("import", files.directory, tmp_path / "native")
    assert "no tokenizer files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("2GiB", 2**31), ("500 mb", 5 * 10**8), ("1.5KB", 1500), ("7", 7)],
)
def test_sizes(text, size):
    assert convert.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "5TBs", "1e3"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="is not a size"):
        convert.parse_size(text)
