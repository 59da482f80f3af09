"""TRL's own GRPOTrainer on a tiny random model, with the adapter and a server."""

from __future__ import annotations

import pytest
from fakes import FakeSession

from grm_jax.serving.adapters.trl import trl_reward

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets")


@pytest.mark.slow
def test_a_group_costs_one_judgement_and_a_failure_is_left_out(shared, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    session: FakeSession = shared[0]
    session.requests.clear()
    words = ["<pad>", "<s>", "</s>", "<unk>", "score=2", "score=9", "a", "b", "bad", "fine"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    judge = trl_reward(str(shared[1].base_url), k=2)
    seen: list[list[float | None]] = []

    def reward(prompts, completions, **columns):
        # What a failing judge is to this test: each group of the prompt "bad" fails as a whole.
        marked = [
            f"{completion} unreadable" if prompt == "bad" else completion
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        seen.append(judge(prompts=prompts, completions=marked, **columns))
        return seen[-1]

    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["fine", "bad"] * 2}),
        processing_class=tokenizer,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=16,
            num_generations=8, max_completion_length=4, learning_rate=1e-3, report_to=[],
            use_cpu=True, bf16=False, logging_steps=1, save_strategy="no", shuffle_dataset=False,
        ),
    )  # fmt: skip
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer.train()

    assert trainer.state.global_step == 2
    # Two steps of two groups: one judgement a group of 8, and k = 2 critiques for all of it.
    assert [len(request.record.responses) for request in session.requests] == [8] * 4
    assert sum(request.options.k for request in session.requests) == 8
    for rewards in seen:
        assert sorted(r is None for r in rewards) == [False] * 8 + [True] * 8
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2 and all(loss == loss for loss in losses)
    assert any((a != b).any() for a, b in zip(before, model.parameters(), strict=True))
