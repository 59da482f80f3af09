"""transformers' generate with num_return_sequences=k."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from common import arguments, serve
from hf import generate

args = arguments()
torch.set_num_threads(args.threads)
model = transformers.Gemma2ForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
prompt = torch.tensor([args.ids])


def run(seed: int) -> int:
    return generate(model, prompt, args.k, args.new, seed)


serve(f"transformers {transformers.__version__}", run)
