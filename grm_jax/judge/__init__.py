"""The one way from a record to a verdict.

    record -> prompts -> sampler -> text -> scores in the record's order -> (meta RM) -> votes

prompts.py     a record as token ids: template, order of the responses
critiques.py   critiques drawn with a sampler, and how many are enough
meta.py        the meta RM, which says how far a critique can be trusted
judge.py       `Judge`: load, score one query, sample many records
samples.py     one critique of one record, and its file
cache.py       critiques on disk, which are not drawn again
scalar.py      scores of a scalar head
about.py       grm.json: what is known of a model besides its weights
"""
