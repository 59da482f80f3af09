"""Train: `python -m grm_jax.train --config rl.py[:SIZE[,NAME=VALUE,..]] [options]`.

Recipes: sft.py rft.py rl.py meta_rm.py scalar_rm.py (one stage each) and spct.py (the whole
pipeline). Every field of a recipe is an option; `--config rl.py --help` explains them. NAME=VALUE
is an argument that a recipe declares, as in rl.py:27b,group=8.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grm_jax import options, stopping
from grm_jax.errors import UserError, describe
from grm_jax.output import surviving
from grm_jax.parallel.host import use_huge_pages
from grm_jax.parallel.options import MeshConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

# The first words of options that belong to one stage alone.
STAGE_PREFIXES = ("sft", "rft", "rl", "meta-rm", "scalar-rm", "evaluation")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe. Returns the exit code: 0 done, or stopped by SIGTERM and saved; 1 a user's
    mistake; 130 stopped by Ctrl-C and saved."""
    args = list(sys.argv[1:] if argv is None else argv)
    with surviving(), stopping.handled():
        try:
            return _main(args)
        except stopping.Stopped as stopped:
            return _stopped(str(stopped), stopped.terminated, args)
        except (UserError, OSError) as error:
            print(f"error: {describe(error)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt as signal:
            what = "stopped; everything that was finished before is kept"
            return _stopped(what, stopping.terminated(signal), args)


def _stopped(what: str, terminated: bool, args: Sequence[str]) -> int:
    """Print the command that resumes; returns the exit code."""
    command = shlex.join(["python", "-m", "grm_jax.train", *args])
    print(f"{what}. Go on with the same command:\n    {command}", flush=True)
    return stopping.exit_code(terminated)


def _main(args: list[str]) -> int:
    import tyro

    from grm_jax import recipes

    if wants_help(args, "--config"):
        print(f"{__doc__}\nRecipes: {recipes.names()}")
        return 0
    spec, rest = split_config(args)
    recipe = recipes.load(spec)
    prog = f"python -m grm_jax.train --config {spec}"
    recipe = tyro.cli(type(recipe), default=recipe, args=rest, prog=prog)
    options.check(recipe)
    return run(recipe, (spec.partition(":")[2], shared_options(rest)))


def shared_options(args: Sequence[str]) -> list[str]:
    """The arguments that every stage of a run takes: all but --init and the options of one stage.

    >>> shared_options(["--base", "m", "--rl.steps", "9", "--length-buckets", "64", "128"])
    ['--base', 'm', '--length-buckets', '64', '128']
    """
    kept, keep = [], True
    for arg in args:
        if arg.startswith("--"):
            name = arg[2:].partition("=")[0]
            keep = name != "init" and name.partition(".")[0].replace("_", "-") not in STAGE_PREFIXES
        if keep:
            kept.append(arg)
    return kept


def wants_help(args: list[str], *needed: str) -> bool:
    """Whether help is asked for without the options `needed`, on which the full help depends."""
    given = all(any(a == name or a.startswith(f"{name}=") for a in args) for name in needed)
    return not given and any(a in ("-h", "--help") for a in args)


def split_config(args: list[str]) -> tuple[str, list[str]]:
    """Take `--config NAME` out of the arguments. Raises ConfigError when it is not there."""
    from grm_jax.recipes import names
    from grm_jax.training.setup import ConfigError

    spec, rest = split_option(args, "--config")
    if spec is None:
        raise ConfigError(
            f"name a recipe: --config NAME.py, with NAME.py one of {names()} (NAME.py:27b for a "
            "size, NAME.py:27b,group=8 for an argument that the recipe declares)"
        )
    return spec, rest


def split_option(args: list[str], name: str) -> tuple[str | None, list[str]]:
    """Take `NAME VALUE` or `NAME=VALUE` out of the arguments; None if it is not there."""
    for index, arg in enumerate(args):
        if arg.startswith(f"{name}="):
            return arg.removeprefix(f"{name}="), args[:index] + args[index + 1 :]
        if arg == name and index + 1 < len(args):
            return args[index + 1], args[:index] + args[index + 2 :]
    return None, args


def run(recipe, given: tuple[str, Sequence[str]] | None = None) -> int:
    """Set up JAX and run the recipe's stage; `given`: see `training.run.Run`. Returns the exit
    code."""
    import jax

    from grm_jax import recipes

    setup_devices(recipe.setup.mesh.cpu_devices)
    from grm_jax.parallel import multihost

    try:
        multihost.initialize(recipe.setup.distributed)
    except (ValueError, RuntimeError) as error:
        print(f"error: joining the other processes: {error}", file=sys.stderr)
        return 1
    from grm_jax.metrics import log, setup_logging
    from grm_jax.training import meta_rm, rft, rl, scalar_rm, sft, spct
    from grm_jax.training.run import Run

    setup_logging()
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        log.info("XLA_FLAGS asks for a number of CPU devices; --mesh.cpu-devices decides here")
    device = first_device()
    log.info("devices          %d x %s", jax.device_count(), device.device_kind)
    this_run = Run(recipe.setup, given=given)
    match recipe:
        case recipes.SPCTRecipe():
            spct.run_spct(this_run, recipe)
        case recipes.SFTRecipe():
            sft.run_sft(this_run, recipe.sft)
        case recipes.RFTRecipe():
            rft.run_rft(this_run, recipe.rft, recipe.init)
        case recipes.RLRecipe():
            rl.run_rl(this_run, recipe.rl, recipe.init)
        case recipes.MetaRMRecipe():
            meta_rm.run_meta_rm(this_run, recipe.meta_rm, recipe.init)
        case recipes.ScalarRMRecipe():
            scalar_rm.run_scalar_rm(this_run, recipe.scalar_rm, recipe.init)
    return 0


def setup_devices(cpu_devices: int) -> None:
    """Virtual CPU devices and the compilation cache, before JAX starts its backend."""
    import jax

    setup_compilation_cache()
    setup_numbers()
    jax.config.update("jax_num_cpu_devices", cpu_devices)
    # Several programs in flight on virtual devices can wait for each other's threads.
    jax.config.update("jax_cpu_enable_async_dispatch", cpu_devices == 1)


def setup_mesh(config: MeshConfig) -> Mesh | None:
    """The mesh of a command that judges, after `setup_devices`; None for the usual one, all devices
    with the parameters split."""
    if config == MeshConfig():
        setup_compilation_cache()
        setup_numbers()
        return None
    from grm_jax.parallel.mesh import make_mesh

    setup_devices(config.cpu_devices)
    return make_mesh(config.replica, config.fsdp, config.tensor, sequence=config.sequence)


def setup_numbers() -> None:
    """Set what random numbers and results depend on, so that a run gives the same results in every
    shell: variables such as JAX_ENABLE_X64 and JAX_DEFAULT_PRNG_IMPL are overridden.
    """
    import jax

    jax.config.update("jax_enable_x64", False)
    jax.config.update("jax_default_prng_impl", "threefry2x32")
    jax.config.update("jax_threefry_partitionable", True)
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_default_matmul_precision", None)
    jax.config.update("jax_disable_jit", False)


def first_device() -> Any:
    """A device. Raises UserError where JAX has none of the kind it was told to use."""
    import jax

    try:
        return jax.devices()[0]
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS")
        raise UserError(
            f"JAX has no device of JAX_PLATFORMS={asked!r} here ({str(error).strip() or 'none'}); "
            "unset JAX_PLATFORMS, or install the package for that device"
        ) from error


def setup_compilation_cache() -> None:
    """Keep every compiled program on disk, so that the next start compiles nothing.

    They are kept in the directory that JAX_COMPILATION_CACHE_DIR names (nowhere if it is empty), or
    else in the user's cache directory. Machines may share it: JAX finds a program by its
    operations, XLA's version and flags, and the kind of device, which for a CPU includes its
    instruction sets.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "grm_jax", "jax"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX leaves out what compiles in less than a second, and a start has hundreds of these.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


if __name__ == "__main__":
    use_huge_pages()
    sys.exit(main())
