"""Checkpoints of a running stage: whole or not resumed from, kept by policy, room checked first."""

from __future__ import annotations

import json
import resource
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax import checkpoint
from grm_jax.checkpoint import StageCheckpoints, damage, drop_leftovers, write_file_list
from grm_jax.errors import UserError
from grm_jax.room import amount


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


def test_orbax_alone_reads_a_flipped_bit_as_another_number(tmp_path):
    """Why there are checksums. Should this fail one day, they can go."""
    values = {"w": jax.random.normal(jax.random.key(0), (20_000,))}
    checkpoint.save_arrays(tmp_path / "w", values)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"w": jax.ShapeDtypeStruct((20_000,), jnp.float32, sharding=where)}
    files = [p for p in (tmp_path / "w").rglob("*") if p.is_file()]
    victim = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    found = checkpoint.load_arrays(tmp_path / "w", wanted)
    assert np.sum(np.asarray(found["w"]) != np.asarray(values["w"])) > 0


@pytest.fixture
def some_files(tmp_path, monkeypatch):
    """Files of no, one and several blocks, the last one short."""
    monkeypatch.setattr(checkpoint, "BLOCK", 3 << 20)
    directory = tmp_path / "files"
    (directory / "deep").mkdir(parents=True)
    for name, size in (("empty", 0), ("small", 5), ("deep/whole", 3 << 20), ("large", 7_000_001)):
        (directory / name).write_bytes(np.random.default_rng(size).bytes(size))
    return directory


def test_each_block_of_a_file_has_its_checksum(some_files, tmp_path):
    write_file_list(some_files, tmp_path / "list")
    expected = {}
    for path in some_files.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            blocks = [data[at : at + (3 << 20)] for at in range(0, len(data), 3 << 20)] or [b""]
            expected[str(path.relative_to(some_files))] = [len(data), *map(zlib.crc32, blocks)]
    assert json.loads((tmp_path / "list").read_text()) == expected
    assert len(expected["large"]) == 4
    assert damage(some_files, tmp_path / "list") == ""


@pytest.mark.parametrize("at", [0, (3 << 20) - 1, 3 << 20, 7_000_000])
@pytest.mark.parametrize("whole", [False, True])
def test_a_flipped_bit_is_found_in_every_block(at, whole, some_files, tmp_path):
    """Also by a list that has one checksum for each file, whatever its size."""
    write_file_list(some_files, tmp_path / "list")
    if whole:
        sums = {p: p.read_bytes() for p in some_files.rglob("*") if p.is_file()}
        listing = {
            str(p.relative_to(some_files)): [len(data), zlib.crc32(data)]
            for p, data in sums.items()
        }
        (tmp_path / "list").write_text(json.dumps(listing))
        assert damage(some_files, tmp_path / "list") == ""
    data = bytearray((some_files / "large").read_bytes())
    data[at] ^= 1
    (some_files / "large").write_bytes(data)
    assert damage(some_files, tmp_path / "list") == "large is changed"


def test_nothing_is_read_where_a_size_tells(some_files, tmp_path, monkeypatch):
    write_file_list(some_files, tmp_path / "list")
    (some_files / "small").write_bytes(b"1234")
    (some_files / "deep" / "whole").unlink()

    def read(*args):
        raise AssertionError("it was read")

    monkeypatch.setattr(checkpoint, "_checksum", read)
    found = damage(some_files, tmp_path / "list")
    assert sorted(found.split(", ")) == ["deep/whole is missing", "small is changed"]


def test_one_that_was_cut_off_is_removed(tmp_path):
    saved(tmp_path, 4, 8)
    (tmp_path / "8.files.json").unlink()  # killed before the list was written
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()  # killed while writing
    assert restored(tmp_path)[0] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "4.files.json"]


def limited(size: int) -> None:
    """Files beyond `size` bytes fail, as under a quota, `ulimit -f` or on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_no_room_is_noticed_before_anything_is_written(tmp_path):
    saved(tmp_path, 4)
    checkpoints = StageCheckpoints(tmp_path)
    limited(1024)
    try:
        with pytest.raises(UserError, match=r"needs 2\.0 KiB.*File too large.*free.*untouched"):
            checkpoints.save(8, state(8), {})
        with pytest.raises(UserError, match="a checkpoint needs"):
            checkpoints.restore(abstract())
    finally:
        limited(resource.RLIM_INFINITY)
    checkpoints.close()
    assert not list(tmp_path.glob(".room*"))
    assert restored(tmp_path)[0] == 4


# After a first failed write Orbax closes its event loop, and TensorStore's threads that fail later
# still call it, where nobody can catch it.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning"
)
def test_an_error_in_writing_is_the_users_and_leaves_the_one_before(tmp_path, monkeypatch):
    saved(tmp_path, 4)
    monkeypatch.setattr("grm_jax.checkpoint.require_room", lambda *args: None)
    checkpoints = StageCheckpoints(tmp_path)
    limited(100)
    try:
        with pytest.raises(UserError, match=r"checkpoint 8 was not written: .*untouched") as found:
            checkpoints.save(8, state(8), {})
            checkpoints.wait()
    finally:
        limited(resource.RLIM_INFINITY)
    assert "\n" not in str(found.value) and "File too large" in str(found.value)
    checkpoints.close()
    assert restored(tmp_path)[0] == 4


def test_a_run_killed_before_the_list_keeps_the_one_before(tmp_path, monkeypatch):
    saved(tmp_path, 4, latest=1)

    def killed(*args):
        raise OSError(5, "killed here")

    monkeypatch.setattr("grm_jax.checkpoint.write_file_list", killed)
    with pytest.raises(UserError, match="killed here"):
        saved(tmp_path, 8, latest=1)
    assert restored(tmp_path)[0] == 4


def test_an_old_checkpoint_that_can_not_be_deleted_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(path, *args, **kwargs):
        raise PermissionError(1, "Operation not permitted", str(path))

    with monkeypatch.context() as patch, caplog.at_level("WARNING", logger="grm_jax"):
        patch.setattr(Path, "rename", refuse)
        saved(tmp_path, 1, 2, 3, latest=1)
    assert caplog.text.count("can not be deleted") == 2  # one line for each of 1 and 2
    assert StageCheckpoints(tmp_path).steps == [1, 2, 3]
    caplog.clear()
    with monkeypatch.context() as patch, caplog.at_level("WARNING", logger="grm_jax"):
        patch.setattr("grm_jax.checkpoint.shutil.rmtree", refuse)
        saved(tmp_path, 4, latest=3)
    assert "the old checkpoint 1 can not be deleted" in caplog.text
    assert (tmp_path / "old-checkpoint-1").is_dir()
    caplog.clear()
    assert restored(tmp_path)[0] == 4
    assert "damaged" not in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["2", "3", "4"]


@pytest.mark.parametrize(
    "latest, every, option", [(0, 0, "latest"), (-1, 0, "latest"), (1, -2, "every")]
)
def test_keeping_no_checkpoint_is_refused(latest, every, option, tmp_path):
    with pytest.raises(UserError, match=f"--keep.{option} "):
        StageCheckpoints(tmp_path / "c", latest, every)


def test_what_was_moved_aside_goes_when_the_model_is_there(tmp_path, caplog):
    for name in ("unlisted-checkpoint", "damaged-checkpoint-8", "model"):
        (tmp_path / name / "state").mkdir(parents=True)
    with caplog.at_level("INFO", logger="grm_jax"):
        drop_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert "damaged-checkpoint-8 is deleted" in caplog.text


def test_sizes_are_in_the_unit_that_fits():
    assert amount(100) == "100 bytes" and amount(2100) == "2.1 KiB"
    assert amount(5 << 20) == "5.0 MiB" and amount(3 << 40) == "3.0 TiB"
