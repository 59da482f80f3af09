"""transformers' Gemma-2 under torch: AdamW, gradients clipped, every logit.

In float32, or with autocast to bfloat16.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from common import advantages, arguments, serve, tokens

args = arguments()
torch.set_num_threads(args.threads)
model = transformers.Gemma2ForCausalLM.from_pretrained(args.model, dtype=torch.float32).train()
model.config.use_cache = False
if args.remat:
    model.gradient_checkpointing_enable()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
rows, weight = torch.tensor(tokens(), dtype=torch.long), torch.tensor(advantages())[:, None]
together = args.device_batch or len(rows)
parts = list(zip(rows.split(together), weight.split(together), strict=True))
old: dict[int, torch.Tensor] = {}


def run(seed: int) -> float:
    del seed
    total = 0.0
    for index, (part, gain) in enumerate(parts):
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logits = model(part).logits[:, :-1].float()
        logprobs = torch.gather(torch.log_softmax(logits, -1), -1, part[:, 1:, None])[..., 0]
        if args.loss == "sft":
            loss = -logprobs.mean()
        else:
            ratio = torch.exp(logprobs - old.setdefault(index, logprobs.detach()))
            loss = -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
        loss = loss / len(parts)  # parts are of one size
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


serve(f"torch {torch.__version__}, transformers {transformers.__version__}", run)
