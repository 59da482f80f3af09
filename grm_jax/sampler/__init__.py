"""Prompts in, k samples of each out; a prompt is computed and stored once for all its samples.

    engine.py    the loop on the host: begin waiting samples, run a chunk of steps, return the ended
    samples.py   what sampling returns, and what it cost
    schedule.py  which sample runs in which lane and reads which pages; plain Python
    plan.py      settings, and how many samples run at once within a budget of bytes
    memory.py    how many bytes of a device the caches may take
    board.py     the host's arrays that tell the device which lane reads which page
    decode.py    the jitted part: the prefill of pages, and chunks of decode steps
    cache.py     keys and values: shared pages of prompts, and a ring and a stash of own tokens
    attend.py    attention to these caches
    draw.py      temperature, filters and the draw of a token
    weights.py   parameters in the layout that is fast to decode with
    programs.py  compiled programs, counted and timed

The words: a *lane* is a slot of the decoding batch, which runs one sample at a time; a *page* is a
piece of a prompt with its keys and values; a *rank* is one of the places that a page has for lanes
that read it; a *block* holds the older tokens of one lane in the stash.

Data flow: `Request(prompt ids, sample indices) -> pages -> lanes -> chunks of steps -> Sample(ids,
log-probabilities, finish reason)`, each sample as it ends.
"""
