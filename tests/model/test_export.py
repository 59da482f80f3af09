"""What `convert export` writes of a run, as transformers loads it: ids, logits, greedy text.

Tokenizers, models and classes are found by transformers' Auto classes, as the servers built on it
find them.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from grm_jax import convert
from grm_jax.critique.template_set import TemplateConfig
from grm_jax.data.examples import meta_example, reply_example
from grm_jax.data.preferences import Preference, read_preferences
from grm_jax.data.synthetic import WorldConfig
from grm_jax.judge.about import About
from grm_jax.judge.critiques import Critic
from grm_jax.judge.judge import Judge, JudgeOptions
from grm_jax.judge.meta import load_meta_rm
from grm_jax.judge.request import JudgeDefaults
from grm_jax.judge.scalar import score_examples
from grm_jax.model.config import SIZES
from grm_jax.model.storage import load_model
from grm_jax.sampler.options import EngineConfig
from grm_jax.training.options import SFT
from grm_jax.training.run import Run, Stage
from grm_jax.training.setup import Setup

NEW = 24


@pytest.fixture(scope="module")
def run(small, make_params, tmp_path_factory) -> Run:
    """A run whose judge, meta RM and scalar baseline are done: its stages wrote them."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch").set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "micro", small)
        run = Run(
            Setup(
                run_dir=str(tmp_path_factory.mktemp("run")),
                size="micro",
                world=WorldConfig(cold_start=5, train=12, fresh=2, shifted=1),
                templates=TemplateConfig("compact", "compact_single", "compact_meta"),
                judge=JudgeDefaults(temperature=0.5, max_new_tokens=NEW),
                engine=EngineConfig(max_rows=16, page=16, prefill_tokens=64, chunk=8, min_lanes=8),
                length_buckets=(96,),
            )
        )
        for name, labels in (("rl", 0), ("meta_rm", 1), ("scalar_rm", 1)):
            stage = Stage(run, name, SFT())
            stage.begin()
            params = make_params(run.model, 3, num_labels=labels)
            end = run.tokenizer.eos_id  # likelier than the other words, so that some texts end
            stage.finish(params | {"embed": params["embed"].at[end].multiply(2.2)})
    return run


@pytest.fixture(scope="module")
def records(run) -> list[Preference]:
    return [r for r in read_preferences(run.world / "train.jsonl") if len(r.responses) > 1][:4]


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """Stage -> the exported folder; a run's folder stands for its judge."""
    root = tmp_path_factory.mktemp("hf")

    def export(stage: str) -> Path:
        source = run.directory if stage == "rl" else run.directory / stage
        if not (root / stage).exists():
            convert.main(["export", "--input", str(source), "--output", str(root / stage)])
        return root / stage

    return export


@pytest.fixture(scope="module")
def judge(run, one_device) -> Judge:
    return Judge.load(run.directory, mesh=one_device)


def linked(model: Path, root: Path) -> Path:
    """A folder with links to the files of a model, to replace some of them."""
    folder = root / "model"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def loaded(folder: Path, kind: str):
    """(model in float32, tokenizer) of transformers."""
    import torch
    import transformers

    model, info = getattr(transformers, kind).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def test_prompts_have_the_same_ids(exported, judge, records):
    """Without the tokenizer's class, transformers would take Gemma's and read other words."""
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(exported("rl"))
    prompts = judge.prompts(JudgeOptions())
    assert len(theirs) == judge.tokenizer.vocab_size
    for record in records:
        messages = prompts.messages(record, tuple(range(len(record.responses))))
        ids = judge.tokenizer.chat(messages)
        assert theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        ) == list(ids)
        assert len(set(ids)) > 10, "no row of unknown words"
        assert theirs.decode(ids[1:-1]) == judge.tokenizer.decode(ids)
    spaced = judge.tokenizer.encode(" 2, } anna, ben")
    assert theirs.decode(spaced) == judge.tokenizer.decode(spaced)


def test_logits_and_greedy_text_of_the_judge(run, exported, judge, records, our_logits):
    import torch

    config, params = load_model(run.directory / "rl" / "model")
    model, tokenizer = loaded(exported("rl"), "AutoModelForCausalLM")
    critic = Critic(judge.sampler, judge.prompts(JudgeOptions(order="given")))
    cold = dataclasses.replace(judge.sampling(JudgeOptions()), temperature=0.0)
    found = critic.critiques(judge.params, records, [0], cold, jax.random.key(0))
    ends = set()
    length = max(len(ours.prompt) for (ours,) in found.values())
    for (ours,) in found.values():
        ids = torch.tensor([ours.prompt])
        with torch.no_grad():
            theirs = model(ids).logits.numpy()
            # Its end tokens and its length limit come from the exported files.
            out = model.generate(ids, do_sample=False)[0, len(ours.prompt) :].tolist()
        padded = np.pad(ids.numpy(), ((0, 0), (0, length - ids.shape[1])))
        logits = our_logits(params, config, padded)[:, : ids.shape[1]]
        np.testing.assert_allclose(logits, theirs, atol=1e-4, rtol=1e-4)
        assert out == ours.ids.tolist()
        assert tokenizer.decode(out, skip_special_tokens=True) == ours.text
        ends.add(ours.finish_reason)
    assert ends == {"stop", "length"}, "a text that ends, and one that is cut"


def test_the_sampling_of_the_judge_is_in_the_files(exported, judge):
    import transformers

    folder = exported("rl")
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "do_sample": True,
        "eos_token_id": [2],
        "max_new_tokens": NEW,
        "pad_token_id": 0,
        "temperature": 0.5,
        "top_k": judge.model.vocab_size,
        "top_p": 1.0,
    }
    found = transformers.GenerationConfig.from_pretrained(folder)
    assert (found.temperature, found.do_sample, found.max_new_tokens) == (0.5, True, NEW)
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden_activation"] == config["hidden_act"] == "gelu_pytorch_tanh"
    assert config["architectures"] == ["Gemma2ForCausalLM"]
    assert (config["pad_token_id"], config["eos_token_id"]) == (0, 2)


def test_a_greedy_judge_and_the_settings_of_its_base(run, tmp_path):
    """What the judge says counts for more than what came with its base model; the rest stays."""
    model = run.directory / "rl" / "model"
    said = linked(model, tmp_path) / "generation_config.json"
    said.unlink()
    said.write_text(json.dumps({"eos_token_id": [2, 3], "temperature": 0.9, "min_p": 0.1}))
    about = dataclasses.replace(About.read(model), judge=JudgeDefaults(0.0, 7))
    (tmp_path / "model" / "grm.json").unlink()
    about.write(tmp_path / "model")
    convert.main(["export", "--input", str(tmp_path / "model"), "--output", str(tmp_path / "hf")])
    found = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert found["eos_token_id"] == [2, 3] and found["min_p"] == 0.1
    assert (found["do_sample"], found["temperature"], found["max_new_tokens"]) == (False, 0.0, 7)
    # Imported again, it is judged as before.
    convert.main(["import", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "back")])
    assert About.read(tmp_path / "back").judge == about.judge


def heads(run, stage, records, mesh):
    """(examples, our scores of them) of a stage with a scalar head."""
    found = load_meta_rm(run.directory / stage, mesh)
    tokenizer = run.tokenizer
    if stage == "scalar_rm":
        examples = [
            reply_example(r.turns, text, tokenizer) for r in records for text in r.responses
        ]
    else:
        examples = [
            meta_example(r.turns, r.responses, text, tokenizer, found.template)
            for r in records
            for text in (" larger", " 1 2 3", "")
        ]
    return examples, score_examples(found.params, found.model, examples, found.buckets, 128, mesh)


@pytest.mark.parametrize("stage", ["meta_rm", "scalar_rm"])
@pytest.mark.parametrize("side", [None, "left"])
def test_scores_of_a_padded_batch(run, exported, records, one_device, stage, side):
    """transformers finds where each row ends by the id that pads."""
    import torch

    model, tokenizer = loaded(exported(stage), "AutoModelForSequenceClassification")
    assert type(model).__name__ == "Gemma2ForSequenceClassification"
    assert model.config.num_labels == 1 and tokenizer.padding_side == "right"
    examples, ours = heads(run, stage, records, one_device)
    rows = [{"input_ids": list(e.prompt + e.completion)} for e in examples]
    batch = tokenizer.pad(rows, padding=True, return_tensors="pt", padding_side=side)
    assert (batch["attention_mask"].sum(1) < batch["input_ids"].shape[1]).any(), "padded rows"
    with torch.no_grad():
        theirs = model(**batch).logits[:, 0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)
    assert np.ptp(ours) > 0.1


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_a_stop_token_never_pads_a_scalar_model(run, records, one_device, tmp_path, pad):
    """transformers would pass over the end of a row that ends with it."""
    import torch

    config = linked(run.directory / "meta_rm" / "model", tmp_path) / "tokenizer_config.json"
    said = json.loads(config.read_text()) | {"pad_token": pad}
    config.unlink()
    config.write_text(json.dumps(said))
    convert.main(["export", "--input", str(tmp_path / "model"), "--output", str(tmp_path / "hf")])
    model, tokenizer = loaded(tmp_path / "hf", "AutoModelForSequenceClassification")
    examples, ours = heads(run, "meta_rm", records, one_device)
    rows = [{"input_ids": list(e.prompt + e.completion)} for e in examples]
    with torch.no_grad():
        batch = tokenizer.pad(rows, padding=True, return_tensors="pt")
        np.testing.assert_allclose(ours, model(**batch).logits[:, 0].numpy(), atol=1e-4, rtol=1e-4)
    config.write_text(json.dumps(said | {"bos_token": None}))
    with pytest.raises(SystemExit, match="one token early; name another `pad_token`"):
        convert.main(
            ["export", "--input", str(tmp_path / "model"), "--output", str(tmp_path / "h")]
        )


def test_a_class_that_is_named_stays(run, tmp_path):
    from grm_jax.model.hf_export import save

    for named in ("GemmaTokenizer", None):
        folder = tmp_path / f"{named}"
        run.tokenizer.save(folder / "tokenizer")
        config = folder / "tokenizer" / "tokenizer_config.json"
        said = json.loads(config.read_text()) | {"tokenizer_class": named, "padding_side": "right"}
        config.write_text(json.dumps(said))
        save(folder / "hf", run.model, run.params("rl"), tokenizer_dir=folder / "tokenizer")
        written = json.loads((folder / "hf" / "tokenizer_config.json").read_text())
        assert written["padding_side"] == "right"
        if named:
            assert written == said
        else:
            assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
            assert written["clean_up_tokenization_spaces"] is False
