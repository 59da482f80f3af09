"""transformers' generate with num_return_sequences=k."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from common import arguments, serve

args = arguments()
torch.set_num_threads(args.threads)
model = transformers.Gemma2ForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
prompt = torch.tensor([args.ids])


@torch.inference_mode()
def run(seed: int) -> int:
    torch.manual_seed(seed)
    out = model.generate(
        prompt, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=args.k,
        max_new_tokens=args.new, min_new_tokens=args.new, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return out.shape[0] * (out.shape[1] - len(args.ids))


serve(f"transformers {transformers.__version__}", run)
