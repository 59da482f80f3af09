"""Gemma-2 and other decoders in pure JAX: one forward pass, two heads, and their files.

    shape.py               the shape of a model, and the features in which families differ
    families/              Gemma-2, Gemma-3 (text), Llama, Qwen2, Qwen3: one declaration each
    config.py              the sizes that have a name
    options.py             the options of how a model is computed and trained
    params.py              the table of parameters, from which all else about them is derived
    transformer.py         the forward pass
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
    huggingface.py         reading Hugging Face checkpoints, with hf_config.py and hf_fields.py
    hf_export.py           writing them

Data flow: `ModelConfig -> param_table -> params -> forward(tokens, positions, attend) -> hidden
-> heads`. The forward pass knows nothing of caches, losses or prompts: its caller hands it an
`attend` function (in training, attention of a row to itself; in sampling, attention to a cache).
"""
