"""What a command says in one line, and what keeps its traceback."""

from __future__ import annotations

import pytest

from grm_jax.errors import UserError, describe


def test_a_users_mistake_is_one_line(tmp_path):
    assert describe(UserError("a.txt: broken; write it again")) == "a.txt: broken; write it again"
    with pytest.raises(OSError) as error:
        (tmp_path / "none").read_text()
    assert describe(error.value) == f"{tmp_path / 'none'}: No such file or directory"


def test_what_is_no_users_mistake_is_raised_again():
    fault = OSError("a library's own words")
    with pytest.raises(OSError, match="a library's own words") as error:
        describe(fault)
    assert error.value is fault
