"""Checkpoints of a running stage: whole or not taken up, kept by policy, room checked first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.checkpoint import StageCheckpoints


def state(value: float):
    return {"w": jnp.full((64, 8), value), "step": jnp.asarray(int(value), jnp.int32)}


def abstract():
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state(0))


def saved(directory: Path, *steps: int, **settings) -> None:
    checkpoints = StageCheckpoints(directory, **settings)
    for step in steps:
        checkpoints.save(step, state(step), {"next_index": step, "nested": [1, {"a": None}]})
    checkpoints.close()


def restored(directory: Path):
    checkpoints = StageCheckpoints(directory)
    found = checkpoints.restore(abstract())
    checkpoints.close()
    return (None, None, None) if found is None else found


def test_the_newest_is_restored_with_its_position(tmp_path):
    assert restored(tmp_path / "none")[0] is None
    saved(tmp_path / "c", 3, 5)
    step, found, position = restored(tmp_path / "c")
    assert found is not None
    assert step == 5 and int(found["step"]) == 5
    np.testing.assert_array_equal(found["w"], state(5)["w"])
    assert position == {"next_index": 5, "nested": [1, {"a": None}]}


def test_the_newest_and_some_others_are_kept(tmp_path):
    saved(tmp_path, *range(1, 8), latest=2, every=3)
    assert StageCheckpoints(tmp_path).steps == [3, 6, 7]
    assert sorted(p.name for p in tmp_path.glob("*.files.json")) == [
        f"{step}.files.json" for step in (3, 6, 7)
    ]


@pytest.mark.parametrize("harm", ["truncate", "flip", "delete", "list"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(harm, tmp_path, caplog):
    directory = tmp_path / "checkpoints"
    saved(directory, 4, 8)
    files = [p for p in (directory / "8" / "state").rglob("*") if p.is_file()]
    victim = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    match harm:
        case "truncate":
            victim.write_bytes(data[: len(data) // 2])
        case "flip":
            data[len(data) // 2] ^= 1
            victim.write_bytes(data)
        case "delete":
            victim.unlink()
        case "list":
            listed = json.loads((directory / "8.files.json").read_text())
            listed["state/gone"] = [3, 5]
            (directory / "8.files.json").write_text(json.dumps(listed))
    with caplog.at_level("WARNING", logger="grm_jax"):
        step, found, _ = restored(directory)
    assert found is not None
    assert step == 4 and int(found["step"]) == 4
    assert f"checkpoint {directory / '8'} is damaged" in caplog.text
    assert (tmp_path / "damaged-checkpoint-8").is_dir(), "nothing is thrown away"
    saved(directory, 8)  # the step is free again
    assert restored(directory)[0] == 8


def test_one_that_was_cut_off_is_removed(tmp_path):
    saved(tmp_path, 4, 8)
    (tmp_path / "8.files.json").unlink()  # killed before the list was written
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()  # killed while writing
    assert restored(tmp_path)[0] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "4.files.json"]


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    saved(tmp_path, 4)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    checkpoints = StageCheckpoints(tmp_path)
    with pytest.raises(OSError, match=r"needs 0.00 GiB and the disk has 0.00 GiB free.*untouched"):
        checkpoints.save(8, state(8), {})
    checkpoints.close()
    assert restored(tmp_path)[0] == 4
