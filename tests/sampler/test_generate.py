"""Greedy sampling is transformers' greedy `generate`, on the same random weights."""

from __future__ import annotations

import numpy as np
import pytest

from grm_jax.model import hf_export
from grm_jax.sampler.engine import Sampler
from grm_jax.sampler.options import EngineConfig
from grm_jax.sampler.schedule import Request

NEW = 14


@pytest.fixture(scope="module")
def reference(small, small_params, tmp_path_factory):
    """Gemma2ForCausalLM with the small model's parameters."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    directory = tmp_path_factory.mktemp("hf")
    hf_export.save(directory, small, small_params)
    return transformers.Gemma2ForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()


def test_greedy_tokens_are_those_of_generate(
    reference, small, small_params, prompts, one_device, draw_samples
):
    """Prompts shorter than the window, as long, and longer; samples that cross it."""
    import torch

    sampler = Sampler(small, [1000], EngineConfig(3, 8, 48, 8), one_device)
    requests = [Request(name, prompt, (0,)) for name, prompt in prompts.items()]
    found = draw_samples(
        requests, sampler=sampler, weights=small_params, temperature=0.0, max_new_tokens=NEW
    )
    seen = set()
    for name, prompt in prompts.items():
        with torch.no_grad():
            out = reference.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, eos_token_id=None,
                pad_token_id=0, output_scores=True, return_dict_in_generate=True,
            )  # fmt: skip
        expected = out.sequences[0, len(prompt) :].tolist()
        sample = found[name, 0]
        assert sample.tokens.tolist() == expected
        scores = torch.stack(out.scores, dim=1)[0].log_softmax(-1)
        picked = scores[torch.arange(NEW), torch.tensor(expected)].numpy()
        np.testing.assert_allclose(sample.logprobs, picked, atol=1e-4)
        seen |= set(expected)
    assert len(seen) > 6, "a varied text, or the comparison says little"
