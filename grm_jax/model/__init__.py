"""Gemma-2 in pure JAX: sizes, one forward pass, two heads, and Hugging Face files in and out.

    config.py              the shape of a model, and the published sizes
    options.py             the options of how a model is computed and trained
    params.py              the table of parameters, from which all else about them is derived
    gemma2.py              the forward pass
    attention.py           masks by position, and attention in plain arrays
    softmax_sums.py        a softmax in parts, as sums that add up, with a softcap and without
    attention_backends.py  the choice of how attention is computed
    chunked_attention.py   attention in linear memory on any device
    attention_kernels.py   fused attention kernels of TPUs and GPUs
    shared_prefix.py       several completions of a prompt, which is computed once
    heads.py               the vocabulary head and the scalar head
    batch.py               scores and log-probabilities of collated batches
    linear.py              products with weights, however these are stored
    lora.py                low-rank adapters
    flops.py               the floating-point operations of a step
    storage.py             model directories, of this package or of Hugging Face
    huggingface.py         reading Hugging Face checkpoints; hf_config.py, hf_export.py beside it

Data flow: `ModelConfig -> param_table -> params -> forward(tokens, positions, attend) -> hidden
-> heads`. The forward pass knows nothing of caches, losses or prompts: its caller hands it an
`attend` function (in training, attention of a row to itself; in sampling, attention to a cache).
"""
