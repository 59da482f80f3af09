"""The wheels that grm_jax needs on a machine without network, beside the packages it has.

    python -m pip list --format=freeze > have.txt                        on that machine
    python experiments/gpu/wheels.py --have have.txt --output wheels     where there is a network

A line of `have.txt` is NAME==VERSION, or NAME alone, which counts as new enough. Packages whose
version `pyproject.toml` does not allow are brought in another one. Prints the sizes, and the lines
with which the wheels are installed and used there. `--also tokamax` brings more packages, and
`--without duckdb` leaves one out that is not needed for what is used. Run it with the same version
of Python where you can: pip judges conditions such as `python_version < "3.12"` by its own.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[2]
# pip takes each name as it is: a newer system also runs what was built for an older one.
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17",
             "manylinux2014", "manylinux1")  # fmt: skip
MIB = 2**20


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder of the wheels")
    parser.add_argument("--have", type=Path, help="the packages of that machine, a line each")
    parser.add_argument("--also", nargs="+", default=[], metavar="REQUIREMENT")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="NAME", help="not to be brought"
    )
    parser.add_argument("--python", default="3.12", help="the Python version of that machine")
    parser.add_argument("--machine", default="x86_64", help="its processor")
    parser.add_argument("--limit-mib", type=float, default=64.0, help="the most that can travel")
    return parser.parse_args(given)


def main(args: argparse.Namespace) -> int:
    have = read_have(args.have.read_text(encoding="utf-8")) if args.have else {}
    have |= {canonicalize_name(name): "" for name in args.without}
    needed = wanted(project_requirements(), have, args.python)
    needed += [Requirement(text) for text in args.also]
    args.output.mkdir(parents=True, exist_ok=True)
    for old in args.output.glob("*.whl"):
        old.unlink()
    if needed:
        download(needed, have, target_options(args.python, args.machine), args.output)
    sizes = {wheel: wheel.stat().st_size for wheel in args.output.glob("*.whl")}
    for wheel, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size / MIB:8.2f} MiB  {wheel.name}")
    total = sum(sizes.values()) / MIB
    print(f"{total:8.2f} MiB  {len(sizes)} wheels, of at most {args.limit_mib:g} MiB")
    print("\nThere, in a clone:\n")
    site, folder = "/tmp/site", shlex.quote(str(args.output))
    print(f"    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade \\\n"
          f"        --target {site} {folder}/*.whl")  # fmt: skip
    print(f"    export PYTHONPATH={site}:$PWD")
    print("    python3 experiments/gpu/day.py --minutes 12")
    if total > args.limit_mib:
        print(
            f"error: {total:.0f} MiB are more than {args.limit_mib:g}; list more packages in "
            "--have, or take the wheels there in parts",
            file=sys.stderr,
        )
        return 1
    return 0


def project_requirements() -> list[Requirement]:
    """The dependencies of grm_jax, without extras."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return [Requirement(text) for text in content["project"]["dependencies"]]


def read_have(text: str) -> dict[str, str]:
    """Name -> version, or an empty string where none is given, of the lines of `pip list`."""
    found = {}
    for line in text.splitlines():
        words = re.split(r"==|\s+@\s+|\s+|,", line.split("#")[0].strip(), maxsplit=1)
        if words[0]:
            version = words[1].strip() if len(words) > 1 else ""
            # An address instead of a version (NAME @ file:..) tells none.
            found[canonicalize_name(words[0])] = "" if ":" in version else version
    return found


def wanted(
    requirements: Sequence[Requirement], have: Mapping[str, str], python: str
) -> list[Requirement]:
    """The requirements that the machine's packages do not meet."""
    environment = {"python_version": python, "extra": ""}
    return [
        requirement
        for requirement in requirements
        if (requirement.marker is None or requirement.marker.evaluate(environment))
        and not meets(requirement, have)
    ]


def meets(requirement: Requirement, have: Mapping[str, str]) -> bool:
    """Whether a package that is there, in a version that is allowed, is what is required."""
    name = canonicalize_name(requirement.name)
    return name in have and (not have[name] or requirement.specifier.contains(have[name], True))


def lacks(name: str, version: str, have: Mapping[str, str]) -> bool:
    """Whether the machine has no package of this name, or has it in another version."""
    return name not in have or bool(have[name] and have[name] != version)


def target_options(python: str, machine: str) -> list[str]:
    """pip's options for that machine."""
    options = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    for platform in PLATFORMS:
        options += ["--platform", f"{platform}_{machine}"]
    return options


def download(
    needed: Sequence[Requirement], have: Mapping[str, str], target: Sequence[str], output: Path
) -> None:
    """The wheels of the requirements and of what they need in turn, but for those that the machine
    has; they go together with these.

    Raises SystemExit, after pip's message, where there are no such wheels.
    """
    named = {canonicalize_name(requirement.name) for requirement in needed}
    fixed = [
        f"{name}=={version}" for name, version in have.items() if version and name not in named
    ]
    pip("download", "--quiet", *target, "--dest", str(output), *map(str, needed), constraints=fixed)
    for wheel in output.glob("*.whl"):
        name, version, *_ = parse_wheel_filename(wheel.name)
        if not lacks(name, str(version), have):
            wheel.unlink()


def pip(*arguments: str, constraints: Sequence[str] = ()) -> None:
    """Run pip under these constraints and no others: those of this machine's configuration are not
    the other one's. Raises SystemExit, after its message, if it fails."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("\n".join(constraints) + "\n")
        file.flush()
        done = subprocess.run(
            [sys.executable, "-m", "pip", *arguments],
            stdout=subprocess.DEVNULL, env=os.environ | {"PIP_CONSTRAINT": file.name},
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"error: pip {arguments[0]} ended with {done.returncode}, see above")


if __name__ == "__main__":
    sys.exit(main(arguments()))
