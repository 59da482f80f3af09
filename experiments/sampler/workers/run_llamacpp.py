"""llama.cpp (llama-cpp-python): one prefill, its cache copied to k sequences, a batch a step.

Weights in float32, or as --dtype says (BF16, Q8_0); a float32 cache, and temperature 1 by Gumbel
noise in NumPy.
"""

import ctypes
import importlib.metadata

import llama_cpp as llama
import numpy as np
from common import arguments, serve

args = arguments()
llama.llama_backend_init()
silence = llama.llama_log_callback(lambda level, text, data: None)
llama.llama_log_set(silence, ctypes.c_void_p(0))
settings = llama.llama_model_default_params()
settings.use_mmap = False
kind = args.dtype or "F32"
file = args.model / ("model.gguf" if kind == "F32" else f"model-{kind}.gguf")
model = llama.llama_model_load_from_file(str(file).encode(), settings)
assert model, f"{file} could not be loaded"
words = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
length = len(args.ids)
context = llama.llama_context_default_params()
context.n_ctx = length + args.k * args.new + 64
context.n_batch = context.n_ubatch = 512
context.n_seq_max = args.k
context.n_threads = context.n_threads_batch = args.threads
context.type_k = context.type_v = 0  # float32
context.kv_unified = True
context.swa_full = True
state = llama.llama_init_from_model(model, context)
assert state, "no context"
memory = llama.llama_get_memory(state)
batch = llama.llama_batch_init(max(512, args.k), 0, args.k)


def decode(tokens, positions, sequences, wanted) -> None:
    batch.n_tokens = len(tokens)
    rows = zip(tokens, positions, sequences, wanted, strict=True)
    for i, (token, position, sequence, want) in enumerate(rows):
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, want
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = sequence
    assert llama.llama_decode(state, batch) == 0


def logits(row: int) -> np.ndarray:
    return np.ctypeslib.as_array(llama.llama_get_logits_ith(state, row), (words,))


def run(seed: int) -> int:
    rng = np.random.default_rng(seed)
    llama.llama_memory_clear(memory, True)
    for start in range(0, length, 512):
        part = args.ids[start : start + 512]
        last = start + len(part) == length
        wanted = [0] * (len(part) - 1) + [int(last)]
        decode(part, range(start, start + len(part)), [0] * len(part), wanted)
    z = np.repeat(logits(len(part) - 1)[None], args.k, 0)
    for sequence in range(1, args.k):
        llama.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
    for step in range(args.new):
        noise = -np.log(-np.log(rng.random(z.shape, dtype=np.float32) + 1e-20) + 1e-20)
        tokens = (z + noise).argmax(-1)
        if step < args.new - 1:
            decode(tokens.tolist(), [length + step] * args.k, range(args.k), [1] * args.k)
            z = np.stack([logits(row) for row in range(args.k)])
    return args.k * args.new


serve(f"llama.cpp (llama-cpp-python {importlib.metadata.version('llama-cpp-python')})", run)
