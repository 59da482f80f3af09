"""The wheels that grm_jax needs on a machine without network, beside the packages it has.

    python -m pip list --format=freeze > have.txt                        on that machine
    python experiments/gpu/wheels.py --have have.txt --output wheels     where there is a network

A line of `have.txt` is NAME==VERSION, or NAME alone, which counts as new enough. Packages whose
version `pyproject.toml` does not allow are brought in another one. Prints the sizes, and the lines
with which the wheels are installed and used there. `--also tokamax` brings more packages.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
    parser.add_argument("--python", default="3.12", help="the Python version of that machine")
    parser.add_argument("--machine", default="x86_64", help="its processor")
    parser.add_argument("--limit-mib", type=float, default=64.0, help="the most that can travel")
    return parser.parse_args(given)


def main(args: argparse.Namespace) -> int:
    have = read_have(args.have.read_text(encoding="utf-8")) if args.have else {}
    needed = wanted(project_requirements(), have, args.python)
    needed += [Requirement(text) for text in args.also]
    target = target_options(args.python, args.machine)
    with tempfile.TemporaryDirectory() as scratch:
        chosen = resolve(needed, have, target, Path(scratch)) if needed else {}
    brought = {name: version for name, version in chosen.items() if lacks(name, version, have)}
    args.output.mkdir(parents=True, exist_ok=True)
    for old in args.output.glob("*.whl"):
        old.unlink()
    if brought:
        exact = [f"{name}=={version}" for name, version in sorted(brought.items())]
        pip("download", "--no-deps", *target, "--dest", str(args.output), *exact)
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


def resolve(
    needed: Sequence[Requirement], have: Mapping[str, str], target: Sequence[str], scratch: Path
) -> dict[str, str]:
    """Name -> version of all that the requirements need, with what the machine has as it is there.

    Raises SystemExit, after pip's message, where they do not go together.
    """
    fixed = scratch / "constraints.txt"
    named = {canonicalize_name(requirement.name) for requirement in needed}
    lines = [f"{n}=={v}" for n, v in have.items() if v and n not in named]
    fixed.write_text("\n".join(lines) + "\n", encoding="utf-8")
    report = scratch / "report.json"
    pip("install", "--dry-run", "--ignore-installed", "--quiet", "--report", str(report), *target,
        "--target", str(scratch / "site"), "--constraint", str(fixed),
        *map(str, needed))  # fmt: skip
    found = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {canonicalize_name(one["metadata"]["name"]): one["metadata"]["version"] for one in found}


def pip(*arguments: str) -> None:
    """Run pip. Raises SystemExit, after its message, if it fails."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"error: pip {arguments[0]} failed; see its message above")


if __name__ == "__main__":
    sys.exit(main(arguments()))
