"""Prompts in, k samples of each out; a prompt is computed and stored once for all its samples.

    engine.py    Sampler: all requests at once; Session: requests as they come. The loop
    schedule.py  requests and samples; which sample runs in which lane and reads which pages
    options.py   settings: how tokens are drawn, how the machine is used
    plan.py      how many samples run at once within the memory that there is
    runner.py    weights and caches on the device, and the host's arrays that say who reads what
    decode.py    the jitted part: the prefill of pages, and chunks of decode steps
    cache.py     keys and values: shared pages of prompts, and a ring and a stash of own tokens
    attend.py    attention to these caches
    draw.py      temperature, filters and the draw of a token
    weights.py   parameters in the layout that is fast to decode with
    programs.py  compiled programs, counted and timed, and the cost of sampling

    here               what it is                                          in vLLM or JetStream
    lane               a row of the decoding batch: runs one sample        slot
    page               a piece of a prompt, with its keys and values       block of a shared prefix
    reader             a lane that reads a page; a page has a few at most
    ring, stash        a lane's newest tokens; blocks of its older ones    blocks of a request
    slot               the place of one token in a page or a ring          slot (`slot_mapping`)
    chunk              decode steps between two looks at the queue         scheduler steps
    oversubscription   more samples share a page than it has readers

Data flow: `Request(prompt ids, sample indices) -> pages -> lanes -> chunks of steps -> Sample(ids,
log-probabilities, finish reason)`, each sample as it ends.
"""
