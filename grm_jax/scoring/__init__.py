"""From critiques to figures.

    a benchmark's records -> sampling -> critiques -> aggregate (verdicts by method)
        -> measures (values a record) -> figures -> assess (intervals) -> results -> report

items.py         records with their place in a benchmark
rules.py         ties, unparsable critiques, order and form of the question
benchmark.py     what a benchmark is: how it is read, its rules, its figures
long_prompts.py  prompts that a judge can not take
sampling.py      a model's critiques of a benchmark, from a cache or drawn
scalar_rm.py     a scalar RM's scores of a benchmark, from a cache or computed
scalar_scores.py these scores as a file, as verdicts, and added to votes
judges.py        judges that read nothing, to be beaten
aggregate.py     votes of k critiques, plain, guided, hybrid and adaptive (replay.py)
measures.py      values of verdicts    figures.py     means, macro means, ROC-AUC of them
statistics.py    bootstrap, intervals  bias.py        place, length, identical responses
assess.py        all of it             results.py     what is written, and read again
report.py        tables                plot.py        the figure       html.py  the page
"""
