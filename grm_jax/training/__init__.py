"""The stages of SPCT and what they share.

    sft.py  rft.py  rl.py  meta_rm.py  scalar_rm.py   a stage each, top to bottom: what it can be
                                                      told, its records, its loop, its objective
    spct.py       all stages in order                 road.py       the models at the end, compared
    setup.py      what a recipe says to all stages    run.py        run directory, models by name
    inputs.py     records that a stage can learn from lengths.py    tokens of a record's prompts
    sampling.py   critiques kept chunk by chunk       origin.py     what a stage was made from
    loop.py       steps, checkpoints, metrics         step.py       train state and gradient step
    losses.py     formulas, of arrays alone           trainable.py  all parameters, or adapters
    optimizer.py  optax chains and schedules

Data flow: `records -> (judge) -> examples -> batches -> step(loss) -> checkpoints, metrics`.
"""
