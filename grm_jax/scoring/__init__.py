"""From critiques to figures.

    samples of a judge -> aggregate (verdicts by method) -> measures (values a record) -> figures
                       -> assess (intervals, differences, bias) -> results -> report

items.py       records with their place in a benchmark
rules.py       ties, unreadable critiques, order and form of the question
benchmark.py   what a benchmark is: reading, rules, figures
judges.py      judges that read nothing
"""
