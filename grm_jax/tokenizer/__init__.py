"""One small protocol over Hugging Face tokenizers, sentencepiece models, and the embedded one.

tokenizer.py      the protocol, and the one implementation
loading.py        `load_tokenizer`, `from_tokenizers`
chat_template.py  jinja2 chat templates, and where the outside text stands in them
folding.py        conversations for templates that take alternating turns alone
vocabulary.py     encoding text so that it can not produce a control token
files.py          tokenizer_config.json and its neighbours
"""

from __future__ import annotations

from grm_jax.tokenizer.loading import from_tokenizers, load_tokenizer
from grm_jax.tokenizer.tokenizer import ChatTokenizer, Tokenizer
from grm_jax.tokenizer.vocabulary import TokenizerError

__all__ = ["ChatTokenizer", "Tokenizer", "TokenizerError", "from_tokenizers", "load_tokenizer"]
