"""The stages of SPCT and what they share.

    losses.py     pure functions of arrays            step.py       train state, gradient step
    optimizer.py  optax chains and schedules          loop.py       steps, checkpoints, metrics
    run.py        run directory, what stages share    origin.py     what a stage was made from
    sampling.py   critiques kept chunk by chunk       evaluation.py every stage's model at the end
    sft.py  rft.py  rl.py  meta_rm.py  scalar_rm.py   one stage each, read from top to bottom
    spct.py       the whole road

Data flow: `records -> (sampler) -> examples -> batches -> step(loss) -> checkpoints, metrics`.
"""
