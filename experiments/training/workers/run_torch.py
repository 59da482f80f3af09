"""transformers' Gemma-2 under torch: AdamW, gradients clipped, every logit."""

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
old: list[torch.Tensor] = []


def run(seed: int) -> float:
    del seed
    logits = model(rows).logits[:, :-1].float()
    logprobs = torch.gather(torch.log_softmax(logits, -1), -1, rows[:, 1:, None])[..., 0]
    if args.loss == "sft":
        loss = -logprobs.mean()
    else:
        old.append(logprobs.detach())
        ratio = torch.exp(logprobs - old[0])
        loss = -torch.min(ratio * weight, ratio.clamp(0.8, 1.2) * weight).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


serve(f"torch {torch.__version__}, transformers {transformers.__version__}", run)
