"""Prompts in, k samples of each out; a prompt computed and stored once for all its samples.

    engine.py    the host's loop: begin what waits, a chunk of steps, hand out what has ended
    schedule.py  which sample runs in which lane and reads which pages; plain Python
    plan.py      settings, and how much runs at once within a budget of bytes
    memory.py    bytes that caches may take
    board.py     the host's arrays that tell the device who reads what
    decode.py    the jitted part: pages of prompts, a chunk of decode steps
    cache.py     keys and values: shared pages of prompts; of each lane, a short ring and a stash
    attend.py    attention over them
    draw.py      temperature, filters and the draw itself
    weights.py   parameters in the layout that decoding wants
    programs.py  compiled programs, counted and timed

Data flow: `Request(prompt ids, sample indices) -> pages -> lanes -> chunks of steps -> Sample(ids,
log-probabilities, finish reason)`, as each sample ends.
"""
