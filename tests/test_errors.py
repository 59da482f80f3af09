"""What a command says in one line, and what keeps its traceback."""

from __future__ import annotations

import errno
import os

import pytest

from grm_jax import files
from grm_jax.errors import UserError, describe


def test_a_users_mistake_is_one_line(tmp_path):
    assert describe(UserError("a.txt: broken; write it again")) == "a.txt: broken; write it again"
    with pytest.raises(OSError) as error:
        (tmp_path / "none").read_text()
    assert describe(error.value) == f"{tmp_path / 'none'}: No such file or directory"


def test_a_full_disk_says_where_and_how_to_go_on(tmp_path):
    path = tmp_path / "samples.jsonl"
    with pytest.raises(OSError) as error, files.named(path):
        # A write to an open file: the system names none.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    said = describe(error.value)
    assert said.startswith(f"{path}: No space left on device. ")
    assert said.endswith("give the same command again")
    with pytest.raises(FileNotFoundError) as other, files.named(path):
        (tmp_path / "none").read_text()
    assert describe(other.value) == f"{tmp_path / 'none'}: No such file or directory"


def test_a_file_that_is_written_whole_is_named_as_the_user_knows_it(tmp_path):
    path = tmp_path / "config.json"
    full = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    for opened in (False, True):  # a quota refuses to make the file, or to write to it
        with pytest.raises(OSError) as error, files.written_whole(path) as partial:
            if not opened:
                raise OSError(full.errno, full.strerror, str(partial))
            partial.write_text("{")
            raise full
        assert describe(error.value).startswith(f"{path}: Disk quota exceeded. ")
        assert not list(tmp_path.iterdir())
    with pytest.raises(OSError) as error, files.written_whole(path):
        pass  # nothing was written that could become the file
    assert describe(error.value) == f"{path}: No such file or directory"
    with pytest.raises(OSError) as error, files.written_whole(path):
        (tmp_path / "none").read_text()
    assert describe(error.value) == f"{tmp_path / 'none'}: No such file or directory"


def test_what_is_no_users_mistake_is_raised_again():
    fault = OSError("a library's own words")
    with pytest.raises(OSError, match="a library's own words") as error:
        describe(fault)
    assert error.value is fault
