"""Plan: `python -m grm_jax.plan --config rl.py:27b --topology v5e:8x8 [options of the recipe]`.

Says whether a recipe fits devices, before they are rented. The recipe's programs are compiled for a
TPU slice, on a machine without one, and the bytes on each device by kind, FLOPs, the traffic
between devices, and what to change if it does not fit are printed. For GPUs (`--topology h100:8`)
the same is computed from the parameter table, without compiling. Exit code 0: it fits; 2: it does
not fit; 1: a mistake.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from grm_jax import options
from grm_jax.errors import UserError
from grm_jax.output import surviving


def main(argv: Sequence[str] | None = None) -> int:
    """Plan a recipe. Returns the exit code."""
    with surviving():
        return _main(list(sys.argv[1:] if argv is None else argv))


def _main(args: list[str]) -> int:
    from grm_jax.planning import topology

    topology.prepare()
    from grm_jax import recipes
    from grm_jax.train import split_option, wants_help

    if wants_help(args, "--config", "--topology"):
        print(f"{__doc__}\nRecipes: {recipes.names()}")
        return 0
    try:
        spec, args = split_option(args, "--config")
        name, args = split_option(args, "--topology")
        if spec is None or name is None:
            raise recipes.ConfigError(
                "give --config NAME.py:SIZE and --topology, as in --config rl.py:27b --topology "
                "v5e:8x8 (or h100:8)"
            )
        recipe = recipes.load(spec)
    except recipes.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    import tyro

    prog = f"python -m grm_jax.plan --config {spec} --topology {name}"
    recipe = tyro.cli(type(recipe), default=recipe, args=args, prog=prog)
    try:
        options.check(recipe)
        return plan(recipe, name)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def plan(recipe, name: str) -> int:
    """Print the plan of each stage of a recipe; 0 if all fit, else 2."""
    from grm_jax.parallel.devices import find_device
    from grm_jax.planning import programs as planning
    from grm_jax.planning import topology

    is_tpu = name.startswith("v")
    if is_tpu:
        devices = topology.tpu_devices(name)
        kind = devices[0].device_kind
    else:
        kind, count = topology.gpu(name)
        devices = topology.stand_ins(count)
    count = len(devices)
    run = planning.PlannedRun(recipe.setup, devices, kind, compiles=is_tpu)
    device = find_device(kind)
    assert device is not None, kind
    stages = {
        field: getattr(recipe, field)
        for field in ("sft", "rft", "rl", "meta_rm", "scalar_rm")
        if hasattr(recipe, field)
    }
    print(f"{recipe.setup.size} on {count} x {kind}, mesh {dict(run.mesh.shape)}")
    fits = True
    for stage_name, stage in stages.items():
        try:
            phases = planning.plan_stage(run, stage)
        except planning.OutOfMemory as error:
            print(f"{stage_name}: does not fit: {error}")
            phases, fits = [], False
        if phases:
            print(table(stage_name, phases, device, count, compiled=is_tpu))
            fits &= all(phase.total <= device.memory for phase in phases)
    if not fits:
        print("It does not fit. What helps:\n" + "\n".join(advice(recipe)))
    else:
        print("It fits.")
    return 0 if fits else 2


def table(stage: str, phases, device, count: int, *, compiled: bool) -> str:
    """A Markdown table of each device's bytes in each phase, and lines on FLOPs and traffic."""
    kinds = list(dict.fromkeys(kind for phase in phases for kind in phase.bytes))
    gib = 2**30
    lines = [
        f"\n{stage}, GiB a device" + ("" if compiled else " (from the parameter table)"),
        "| " + " | ".join(["", *(phase.name for phase in phases)]) + " |",
        "| :--- |" + " ---: |" * len(phases),
    ]
    for kind in kinds:
        sizes = [phase.bytes.get(kind) for phase in phases]
        cells = ["-" if size is None else f"{size / gib:.2f}" for size in sizes]
        lines.append("| " + " | ".join([kind, *cells]) + " |")
    totals = [f"{phase.total / gib:.2f}" for phase in phases]
    lines.append("| " + " | ".join([f"total, of {device.memory / gib:.1f}", *totals]) + " |")
    for phase in phases:
        if phase.flops:
            seconds = phase.flops / count / device.flops
            lines.append(
                f"{phase.name}: {phase.flops / count:.3g} model FLOPs a device and step, "
                f"{seconds / 0.4:.3g} s at 40% of its peak"
            )
        sent = {kind: size for kind, size in phase.traffic.items() if size}
        if sent:
            shown = ", ".join(f"{kind} {size / gib:.2f}" for kind, size in sent.items())
            what = "a step" if phase.name == "update" else "a chunk of decode steps"
            lines.append(f"{phase.name}: collectives, GiB a device in {what}: {shown}")
        if phase.seconds:
            lines.append(f"{phase.name}: compiled in {phase.seconds:.0f} s")
    return "\n".join(lines)


def advice(recipe) -> list[str]:
    """The options that save memory and are not used yet, cheapest first."""
    setup = recipe.setup
    lines = []
    if setup.remat == "none":
        lines.append("    --remat block                recompute layers in the backward pass")
    for name in ("sft", "rft", "rl", "meta_rm", "scalar_rm"):
        stage = getattr(recipe, name, None)
        owner = getattr(stage, "fitting", stage)
        option = f"--{name.replace('_', '-')}" + (".fitting" if owner is not stage else "")
        if stage is not None and getattr(owner, "device_batch", 1) != 1:
            lines.append(f"    {option}.device-batch 1    fewer rows at a time")
    rl = getattr(recipe, "rl", None)
    if rl is not None and not rl.offload_reference and not setup.lora.rank:
        lines.append("    --rl.offload-reference       the reference policy in host memory")
    if setup.engine.cache_bytes is None or setup.engine.max_rows > 32:
        lines.append("    --engine.max-rows 64         fewer samples at once, for the rollout")
    if setup.param_dtype == "float32" and not setup.lora.rank:
        lines.append("    --param-dtype bfloat16       half the parameters' memory")
    if not setup.lora.rank:
        lines.append("    --lora.rank 16               adapters: no moments of the whole model")
    lines.append("    more devices, or more of them in --mesh.fsdp or --mesh.tensor")
    return lines


if __name__ == "__main__":
    sys.exit(main())
