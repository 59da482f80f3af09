"""The stages of SPCT and what they share.

    sft.py  rft.py  rl.py  meta_rm.py  scalar_rm.py   one stage each, from top to bottom: its
                                                      records, its loop, its objective
    spct.py          all stages in order
    final_evaluation.py   the models of all stages, compared on held-out records
    options.py       the options of each stage and of its optimizer
    setup.py         the options that all stages share
    run.py           the run directory, and models by name
    origin.py        what a stage was made from, compared when it is resumed
    inputs.py        the records that a stage can learn from
    lengths.py       the tokens of a record under each prompt
    counts.py        such counts, kept for the next start
    sampling.py      critiques of many records, written chunk by chunk
    heldout.py       accuracy on held-out records while a stage trains
    loop.py          steps, checkpoints, metrics
    step.py          the train state and the gradient step
    losses.py        the formulas, as functions of arrays alone
    trainable.py     what is trained: all parameters, or adapters
    optimizer.py     optax chains and schedules

README.md beside this file explains stages, options and files to those who run them.

Data flow: `records -> (judge) -> examples -> batches -> step(loss) -> checkpoints, metrics`.
"""
