"""A reader that leaves, as `head` does."""

from __future__ import annotations

import os
import subprocess
import sys


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code whose standard output has no reader any more."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True,
            check=False,
        )  # fmt: skip
    finally:
        os.close(writer)


MANY = "for i in range(100_000): print(i)\n"


def test_the_work_goes_on_without_a_reader(tmp_path):
    code = "import sys\nfrom grm_jax import output\nwith output.surviving():\n"
    code += "    for i in range(100_000): print(i, flush=i == 5)\n"
    code += f"    open({str(tmp_path / 'done')!r}, 'w').close()\n    print('x')\n"
    done = run(code)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "done").exists()
    assert "BrokenPipeError" in run(MANY).stderr  # what happens otherwise


def test_what_is_read_arrives_and_the_stream_is_given_back(capsys):
    from grm_jax import output

    before = sys.stdout
    with output.surviving():
        print("a", flush=True)
        assert sys.stdout.isatty() is before.isatty()
    assert sys.stdout is before and capsys.readouterr().out == "a\n"
