"""Recipes: every file and size loads; overrides; errors that list what there is."""

from __future__ import annotations

import ast
import dataclasses
import json
import shlex

import pytest
import tyro

from grm_jax import recipes
from grm_jax.identity import differences, hows
from grm_jax.model.config import SIZES, TINY_SIZES, model_config
from grm_jax.recipes import load
from grm_jax.sampler.options import SamplingConfig
from grm_jax.train import main, split_config
from grm_jax.training.optimizer import make_optimizer
from grm_jax.training.setup import SYNTHETIC, ConfigError, to_json

RECIPES = {
    "sft.py": recipes.SFTRecipe,
    "rft.py": recipes.RFTRecipe,
    "rl.py": recipes.RLRecipe,
    "meta_rm.py": recipes.MetaRMRecipe,
    "scalar_rm.py": recipes.ScalarRMRecipe,
    "spct.py": recipes.SPCTRecipe,
}


def parse(spec: str, *args: str):
    recipe = load(spec)
    return tyro.cli(type(recipe), default=recipe, args=list(args))


def test_there_is_a_recipe_for_every_file():
    assert {p.name for p in recipes.CONFIG_DIR.glob("[!_]*.py")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", ["", *(f":{size}" for size in SIZES)])
def test_every_recipe_loads_in_every_size(name, size):
    recipe = load(name + size)
    assert type(recipe) is RECIPES[name]
    setup = recipe.setup
    assert setup.size == (size[1:] or "tiny")
    assert (setup.preferences == SYNTHETIC) == (setup.size in TINY_SIZES)
    # Prompt and critique fit the training rows and the model's positions.
    stages = [getattr(recipe, f.name) for f in dataclasses.fields(recipe)]
    for stage in stages:
        sampling = getattr(stage, "sampling", None)
        if isinstance(sampling, SamplingConfig):
            longest = setup.prompt_buckets[-1] + sampling.max_new_tokens
            assert longest <= setup.length_buckets[-1]
            assert longest <= model_config(setup.size).max_position
            assert sampling.unfiltered
        optimizer = getattr(stage, "optimizer", None) or getattr(
            getattr(stage, "fitting", None), "optimizer", None
        )
        if optimizer is not None:
            assert optimizer.learning_rate > 0
            make_optimizer(optimizer, 10, ())


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", SIZES)
def test_batches_divide_over_devices(name, size):
    recipe = load(f"{name}:{size}")
    mesh = recipe.setup.mesh
    assert [mesh.replica, mesh.fsdp].count(-1) == 1
    for field in dataclasses.fields(recipe):
        stage = getattr(recipe, field.name)
        rows = getattr(getattr(stage, "fitting", None), "batch_size", None)
        if isinstance(stage, recipes.RL):
            rows = stage.train_groups or stage.prompts
        if rows is not None:
            on_a_cpu = {"gemma3_270m": 16, "smollm2_135m": 16} | dict.fromkeys(TINY_SIZES, 2)
            assert rows % on_a_cpu.get(size, 32) == 0


def test_the_paper_figures_of_the_27b_recipes():
    rl, rft = load("rl.py:27b").rl, load("rft.py:27b").rft  # pyright: ignore[reportAttributeAccessIssue]
    assert (rl.kl_coef, rl.group, rl.optimizer.learning_rate, rl.steps) == (0.08, 4, 4e-7, 900)
    assert rl.prompts * rl.group == 512
    assert (rl.tie, rl.aggregation, rl.train_groups) == ("paper", "sequence", None)
    assert rft.samples == 3 and rft.hinted
    assert (rft.fitting.batch_size, rft.fitting.optimizer.learning_rate) == (1024, 5e-6)


STAGES = (recipes.SFT, recipes.RFT, recipes.RL, recipes.MetaRM, recipes.ScalarRM)
SHOWN = (
    *STAGES, recipes.Fitting, recipes.OptimizerConfig, recipes.SamplingConfig, recipes.Evaluation,
    recipes.JudgeDefaults, recipes.TemplateConfig,
)  # fmt: skip


def hidden(call: ast.Call) -> set[str]:
    """Fields that results depend on, and that a call of a recipe file leaves to their defaults."""
    kind = next((kind for kind in SHOWN if kind.__name__ == getattr(call.func, "id", "")), None)
    if kind is None:
        return set()
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    wanted = {field.name for field in dataclasses.fields(kind)} - hows(kind()) - {"pack"}
    if kind is recipes.OptimizerConfig:
        if ast.literal_eval(given["name"]) != "muon":
            wanted.remove("adam_scale")
        if ast.literal_eval(given["schedule"]) == "constant":
            wanted.remove("final_fraction")
    return wanted - given.keys()


def test_recipes_show_what_results_depend_on():
    seen = set()
    for path in recipes.CONFIG_DIR.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            assert not hidden(call), f"{path.name}:{call.lineno}"
            seen.add(getattr(call.func, "id", ""))
    assert seen >= {kind.__name__ for kind in SHOWN}


def test_what_recipes_share_is_described_in_words():
    path = recipes.CONFIG_DIR / "_shared.py"
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert doc is not None and "--base" in doc and "--preferences" in doc
    assert " = " not in doc and "return" not in doc


@pytest.mark.parametrize("name", RECIPES)
def test_the_commands_of_a_recipe_are_its_own(name, capsys):
    """Each command in a header names the recipe and options that it has."""
    doc = ast.get_docstring(ast.parse((recipes.CONFIG_DIR / name).read_text(encoding="utf-8")))
    assert doc is not None
    commands = [
        shlex.split(line)
        for line in doc.replace("\\\n", "").splitlines()
        if line.startswith("    python -m grm_jax.train ")
    ]
    specs = []
    for command in commands:
        spec, rest = split_config(command[3:])
        parse(spec, *rest)
        specs.append(spec)
    assert specs == [name, f"{name}:27b"]


def test_the_pipeline_uses_the_recipes_of_its_stages():
    pipeline = load("spct.py")
    for name in ("sft", "rft", "rl", "meta_rm", "scalar_rm"):
        assert getattr(pipeline, name) == getattr(load(f"{name}.py"), name)


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from grm_jax.recipes import RL, RLRecipe\n"
        "def get_config(size):\n"
        "    return RLRecipe(rl=RL(steps={'tiny': 3, '9b': 5}[size]))\n"
    )
    assert load(str(path)).rl.steps == 3  # pyright: ignore[reportAttributeAccessIssue]
    assert load(f"{path}:9b").rl.steps == 5  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(
        ConfigError,
        match=r"has no size 'huge'; the sizes with a name are tiny, tiny_half, tiny_double, 2b",
    ):
        load(f"{path}:huge")


def write_recipe(path, signature: str, body: str = "RLRecipe(rl=RL(steps=3))") -> str:
    path.write_text(
        "from __future__ import annotations\n"
        "from grm_jax.recipes import RL, RLRecipe\n"
        f"def get_config({signature}):\n    return {body}\n"
    )
    return str(path)


def test_a_recipe_that_is_no_python_is_named_with_its_line(tmp_path):
    (tmp_path / "mine.py").write_text("import beside\n")
    (tmp_path / "beside.py").write_text("x = 1\n<<<<<<< HEAD\n")
    with pytest.raises(recipes.ConfigError, match=r"beside.py:2: no Python: .*; correct the reci"):
        load(str(tmp_path / "mine.py"))


def test_named_arguments_of_the_rl_recipe():
    plain, named = load("rl.py:27b"), load("rl.py:27b,group=8,lr=1e-6")
    rl = plain.rl  # pyright: ignore[reportAttributeAccessIssue]
    optimizer = dataclasses.replace(rl.optimizer, learning_rate=1e-6)
    expected = dataclasses.replace(rl, group=8, prompts=64, optimizer=optimizer)
    assert named == dataclasses.replace(plain, rl=expected)  # pyright: ignore[reportCallIssue]
    assert load("rl.py:27b,lr=4e-7") == plain
    # Without a size, the tiny one; 256 rollouts a step whatever the group.
    tiny = load("rl.py:group=4").rl  # pyright: ignore[reportAttributeAccessIssue]
    assert (tiny.group, tiny.prompts, tiny.train_groups) == (4, 64, 64)
    assert load("rl.py:tiny,group=4").rl == tiny  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("group", [-4, 0, 1, 3, 1024])
def test_a_group_divides_the_rollouts_of_a_step(group):
    with pytest.raises(ConfigError, match=f"group={group}: give 2 or more that divide 512"):
        load(f"rl.py:27b,group={group}")


def test_named_arguments_have_the_types_that_are_declared(tmp_path):
    spec = write_recipe(
        tmp_path / "mine.py",
        "size, other=0, *, n: int = 1, x: float = 0.5, on: bool = False, text: str = '', "
        "few: int | None = None",
        "(size, other, n, x, on, text, few)",
    )
    assert load(spec) == ("tiny", 0, 1, 0.5, False, "", None)
    assert load(f"{spec}:2b,n=-2,x=1e-6,on=true,text=a=b,few=7") == (
        ("2b", 0, -2, 1e-6, True, "a=b", 7)
    )
    assert [type(value) for value in load(f"{spec}:x=1,on=False,text=8")] == (  # pyright: ignore
        [str, int, int, float, bool, str, type(None)]
    )
    for argument, wanted in {
        "n=1.5": "an integer",
        "n=": "an integer",
        "x=fast": "a number",
        "on=1": "true or false",
        "few=None": "an integer",
    }.items():
        with pytest.raises(ConfigError, match=f"mine.py: {argument}: give {wanted}$"):
            load(f"{spec}:2b,{argument}")
    known = r"n \(int\), x \(float\), on \(bool\), text \(str\), few \(int\)$"
    for name in ("other", "size", "N", ""):
        with pytest.raises(ConfigError, match=f"has no argument '{name}'; it has {known}"):
            load(f"{spec}:2b,{name}=3")


def test_named_arguments_that_a_recipe_can_not_take(tmp_path):
    unknown = write_recipe(tmp_path / "unknown.py", "size) -> (NotImported", "RLRecipe()")
    assert load(unknown) == recipes.RLRecipe(), "annotations are read for named arguments alone"
    with pytest.raises(ConfigError, match=r"sft.py: takes no named arguments, and lr=1 is one"):
        load("sft.py:27b,lr=1")
    with pytest.raises(ConfigError, match=r"mine.py: takes no named arguments, and steps=1 is one"):
        load(write_recipe(tmp_path / "mine.py", "size, steps=3, **more") + ":steps=1")
    with pytest.raises(ConfigError, match=r"rl.py: group is given twice"):
        load("rl.py:27b,group=8,group=8")
    for text in ("9b", ""):
        with pytest.raises(ConfigError, match=f"rl.py: '{text}' after the size; give NAME=VALUE"):
            load(f"rl.py:27b,{text}")
    needs = write_recipe(tmp_path / "needs.py", "size, *, n: int")
    with pytest.raises(ConfigError, match=r"needs.py: needs n=VALUE"):
        load(needs)
    assert load(f"{needs}:n=1").rl.steps == 3  # pyright: ignore[reportAttributeAccessIssue]
    for annotation in (": list[int]", ": int | str", ""):
        odd = write_recipe(tmp_path / "odd.py", f"size, *, n{annotation} = None")
        assert load(odd).rl.steps == 3  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(ConfigError, match=r"odd.py: the type of get_config's argument n is"):
            load(f"{odd}:n=1")


def test_only_the_size_itself_is_a_missing_size(tmp_path):
    spec = write_recipe(tmp_path / "mine.py", "size, *, n: int = 4", "{'tiny': {4: 1}}[size][n]")
    assert load(spec) == 1
    with pytest.raises(ConfigError, match="has no size 'huge'"):
        load(f"{spec}:huge,n=4")
    with pytest.raises(KeyError, match="5"):
        load(f"{spec}:n=5")


def test_errors_list_what_there_is(tmp_path):
    known = "meta_rm.py, rft.py, rl.py, scalar_rm.py, sft.py, spct.py"
    with pytest.raises(ConfigError, match=f"rlhf.py: no such recipe, .* there are {known}"):
        load("rlhf.py")
    with pytest.raises(ConfigError, match=r"has no size '3b'"):
        load("rl.py:3b")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match=r"empty.py: defines no get_config\(size\); see"):
        load(str(tmp_path / "empty.py"))


def test_the_command_line_overrides_every_level():
    recipe = parse(
        "rl.py", "--run-dir", "runs/x", "--rl.kl-coef", "0.5", "--rl.sampling.temperature", "0.7",
        "--rl.optimizer.name", "muon", "--prompt-buckets", "8", "16", "--mesh.tensor", "2",
        "--rl.train-groups", "None", "--rl.no-save-rollouts", "--init", "some/model",
    )  # fmt: skip
    assert recipe.setup.run_dir == "runs/x"
    assert (recipe.rl.kl_coef, recipe.rl.sampling.temperature) == (0.5, 0.7)
    assert recipe.rl.sampling.max_new_tokens == load("rl.py").rl.sampling.max_new_tokens
    assert recipe.rl.optimizer.name == "muon"
    assert recipe.setup.prompt_buckets == (8, 16)
    assert recipe.setup.mesh.tensor == 2
    assert recipe.rl.train_groups is None and not recipe.rl.save_rollouts
    assert recipe.init == "some/model"
    assert parse("rl.py") == load("rl.py")


def test_senseless_values_are_refused(capsys):
    for args in (["--rl.tie", "maybe"], ["--rl.stepss", "3"], ["--rl.steps", "many"]):
        with pytest.raises(SystemExit):
            parse("rl.py", *args)
        assert args[0] in capsys.readouterr().err


def test_help_explains_fields(capsys):
    with pytest.raises(SystemExit) as error:
        parse("spct.py", "--help")
    assert error.value.code == 0
    shown = capsys.readouterr().out
    for expected in ("--run-dir", "--rl.kl-coef", "--sft.fitting.steps", "frozen reference"):
        assert expected in shown


def test_split_config():
    assert split_config(["--a", "--config", "rl.py:9b", "b"]) == ("rl.py:9b", ["--a", "b"])
    assert split_config(["--config=rl.py", "x"]) == ("rl.py", ["x"])
    for args in ([], ["--config"], ["rl.py"]):
        with pytest.raises(ConfigError, match=r"--config NAME.py, with NAME.py one of meta_rm.py"):
            split_config(args)


def test_main_reports_a_users_mistake(capsys):
    assert main(["--config", "rlhf.py"]) == 1
    assert capsys.readouterr().err.startswith("error: rlhf.py: no such recipe")


def test_json_holds_every_field_and_differences_name_leaves():
    recipe = load("rl.py")
    tree = json.loads(to_json(recipe))
    assert tree["rl"]["sampling"]["max_new_tokens"] == 64
    changed = dataclasses.replace(
        recipe,
        rl=dataclasses.replace(recipe.rl, steps=7),  # pyright: ignore[reportAttributeAccessIssue]
        setup=dataclasses.replace(recipe.setup, seed=1),
    )
    assert differences(tree, json.loads(to_json(changed))) == {
        "rl.steps": (recipe.rl.steps, 7),  # pyright: ignore[reportAttributeAccessIssue]
        "setup.seed": (0, 1),
    }
    assert differences({"a": {"b": 1}}, {"a": {"c": 1}}) == {"a.b": (1, None), "a.c": (None, 1)}
    assert differences({"a": {"b": 1}}, {"a": {}}, {"a": {"b": 1}}) == {}, "the default"
    assert differences(tree, tree) == {}
    with pytest.raises(TypeError, match="can not be written as JSON"):
        to_json({"a": object()})
