"""transformers' generate with num_return_sequences=k."""

from __future__ import annotations

import torch


@torch.inference_mode()
def generate(model, prompts: torch.Tensor, k: int, new: int, seed: int) -> int:
    """Draw k samples of exactly `new` tokens of each prompt [B, T]; returns how many tokens."""
    torch.manual_seed(seed)
    out = model.generate(
        prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=k,
        max_new_tokens=new, min_new_tokens=new, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return out.shape[0] * (out.shape[1] - prompts.shape[1])
