"""A judge behind HTTP: one engine, the wire protocols that trainers already speak, a page.

    client --HTTP--> app --JudgeRequest--> Service --thread--> JudgeSession --> Verdict

service.py     `Service`: a bounded queue, deadlines, shared answers
engine.py      the thread in which the judge works
problems.py    what can go wrong besides a user's mistake, and the HTTP status of each
limits.py      what a request may ask for at most
app.py         the FastAPI application: native routes, errors, the protocols' routers
guard.py       what every request passes first: size, nesting, token, clients that went away
native.py      the native routes; schemas.py: their JSON; replies.py: errors as JSON
metrics.py     counters and histograms for Prometheus
running.py     the process: socket, signals, drain
page/          the page on which a person pastes texts and reads the verdict

No module here imports JAX when it is loaded: only the engine's thread does.
"""
