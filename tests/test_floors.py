"""The layout of the package: who may import whom. A package knows only what lies below it."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import grm_jax

PACKAGE = Path(grm_jax.__file__).parent
# From the ground up; a name is a module or a package directly below grm_jax.
FLOORS = (
    ("errors",),
    ("files", "identity", "stopping", "typed"),
    ("critique", "hub", "parallel"),
    ("lock", "metrics", "options", "output", "room", "tokenizer"),
    ("checkpoint", "data"),
    ("model",),
    ("sampler",),
    ("judge",),
    ("scoring",),
    ("benchmarks",),
    ("training",),
    ("recipes",),
    ("planning",),
    ("serving",),
    ("evaluate_options",),
    ("conversion", "train"),
    ("convert", "evaluate", "judge_command", "plan", "serve"),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
NO_JAX = ("errors", "files", "critique", "stopping")


def imports() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, wherever in the file."""
    known = {_name(path) for path in PACKAGE.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        targets = found.setdefault(_name(path), set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grm_jax"):
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    targets.add(whole if whole in known else str(node.module))
            elif isinstance(node, ast.Import):
                targets |= {a.name for a in node.names if a.name.startswith("grm_jax")}
    return found


def _name(path: Path) -> str:
    """The module; a package's command (`__main__`) counts as a command beside the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    if parts[-1] == "__main__":
        return f"{parts[0]}.{parts[1]}_command"
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_has_a_floor():
    rooms = {_room(module) for module in imports()} - {""}
    assert rooms == set(FLOOR), "give a new package its floor in FLOORS"


def test_imports_go_down():
    upward = [
        f"{module} imports {target}"
        for module, targets in imports().items()
        for target in targets
        if _room(module)
        and _room(target)
        and _room(module) != _room(target)
        and FLOOR[_room(target)] >= FLOOR[_room(module)]
    ]
    assert not upward


def test_imports_do_not_go_round():
    graph = {
        # A package's own file stands for what it shows; its modules may not import it.
        module: targets - {module}
        for module, targets in imports().items()
        if module != "grm_jax"
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError naming them


def test_the_ground_needs_no_jax():
    for path in PACKAGE.rglob("*.py"):
        if _room(_name(path)) in NO_JAX:
            text = path.read_text(encoding="utf-8")
            assert "import jax" not in text and "from jax" not in text, path
