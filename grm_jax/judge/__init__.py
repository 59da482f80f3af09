"""From a query and responses to a verdict.

    request -> prompts -> sampler -> text -> scores in the record's order -> (meta RM) -> votes

Requests (`Judge.score`, the server) go through session.py, records (evaluation, RFT, RL) through
critiques.py; both share prompts.py, the parser and the votes of `grm_jax.critique`.

request.py     what a judge is asked, and how its critiques are drawn and voted; no JAX
verdict.py     what it answers: scores, winner, rewards, or a named failure; no JAX
judge.py       `Judge`: load, score one query or many, sample the records of a file
base.py        what a judge is made of: weights, prompts, settings, meta RM, scalar RM
session.py     requests in at any time, verdicts out as they end
prepared.py    a request as token ids, and what has come of it so far
dealt.py       responses in groups, anew for each critique, where they are too many for one
expected.py    the mean of the distribution from which a score was drawn
records.py     all critiques of many records, kept in a cache
critiques.py   critiques drawn with a sampler, and how many are enough
prompts.py     a record as token ids: template, order of the responses
meta.py        the meta RM, which says how far a critique can be trusted
scalar.py      the scalar RM, and scores of a scalar head
labels.py      probabilities of chosen tokens behind a prompt: a judge that answers with one token
rows.py        rows of tokens computed in padded batches
cache.py       critiques on disk, which are not drawn again
about.py       grm.json: what is known of a model besides its weights
score_file.py  a file of rows in, the same rows with verdicts out: `python -m grm_jax.judge`
page.py        verdicts as an HTML page
"""
