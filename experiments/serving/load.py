"""A server under load, on a trained judge: nothing is lost, doubled or mixed up; how fast it is.

    python experiments/serving/load.py --model RUN --rows RUN/world/train.jsonl

Requests of mixed size and protocol, each about texts of its own, so that every answer can be told
from every other. What is done with them, each on a server of its own:

    one at a time    the first requests, each after the one before
    together         all, from as many clients at once as asked
    hung up          while clients that ask the same server are killed (SIGKILL) amid their requests
    killed           while the server is killed (SIGKILL) and started again; clients try again

Every answer of the last three must be the one that "together" gave, bit for bit, and that one must
be of its request. Writes load.json and load.md beside this file.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import tyro

import grm_jax
from grm_jax.errors import UserError
from grm_jax.judge.request import JudgeRequest

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: str
    """The judge."""
    rows: Path
    """Preferences in JSONL, whose texts are sent."""
    meta: str | None = None
    scalar: str | None = None
    requests: int = 2000
    clients: int = 64
    alone: int = 60
    """Requests that are sent one at a time."""
    samples: int = 64
    """`--samples` of the server."""
    max_new_tokens: int | None = None
    seed: int = 0
    output: Path = HERE / "load"
    parts: tuple[str, ...] = ("alone", "together", "hung_up", "killed")
    child: str | None = None
    """Internal: the URL that a client, which will be killed, asks for ever."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One request. number: names it; its texts are its own."""

    number: int
    protocol: str
    query: str
    responses: tuple[str, ...]
    k: int


# By protocol: path, body of a task, and the reply as what must be the same in every run. A reply
# that is not of its task raises.
Reading = tuple[str, Callable[[Task], dict[str, Any]], Callable[[Task, httpx.Response], Any]]


def _native(task: Task, **more: Any) -> dict[str, Any]:
    return {"query": task.query, "responses": list(task.responses), "k": task.k, **more}


def _verdict(task: Task, said: dict[str, Any]) -> Any:
    own = JudgeRequest.make(task.query, task.responses).record.id
    assert said["id"] == own, f"request {task.number} got another one's verdict"
    assert len(said["critiques"]) == task.k
    texts = [critique["critique"] for critique in said["critiques"]]
    return [said["scores"], said["failures"], said["scalar"], texts]


def _judge(task: Task, reply: httpx.Response) -> Any:
    return _verdict(task, reply.json())


def _events(task: Task, reply: httpx.Response) -> Any:
    blocks = [block.split("\n") for block in reply.text.split("\n\n") if block]
    verdicts = [lines[1][6:] for lines in blocks if lines[0] == "event: verdict"]
    (one,) = verdicts
    return _verdict(task, json.loads(one))


def _score(task: Task, reply: httpx.Response) -> Any:
    data = reply.json()["data"]
    assert [row["index"] for row in data] == list(range(len(task.responses)))
    return [row["score"] for row in data]


def _rerank(task: Task, reply: httpx.Response) -> Any:
    rows = reply.json()["results"]
    for row in rows:
        assert row["document"]["text"] == task.responses[row["index"]]
    assert len(rows) == len(task.responses)
    return [[row["index"], row["relevance_score"]] for row in rows]


def _chat(task: Task, reply: httpx.Response) -> Any:
    choices = reply.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(2))
    return [choice["message"]["content"] for choice in choices]


def _raw(task: Task, reply: httpx.Response) -> Any:
    data = reply.json()["data"]
    assert len(data) == 1
    return data[0]["probs"]


def _compare(task: Task, reply: httpx.Response) -> Any:
    rewards = reply.json()["rewards"]
    assert len(rewards) == len(task.responses)
    return rewards


def _pair(task: Task) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": task.query},
        {"role": "assistant", "content": task.responses[0]},
    ]


def _objects(task: Task) -> list[dict[str, Any]]:
    return [
        {"output": [{"type": "message", "content": [{"type": "output_text", "text": text}]}]}
        for text in task.responses
    ]


PROTOCOLS: dict[str, Reading] = {
    "judge": ("/v1/judge", _native, _judge),
    "judge, events": ("/v1/judge", lambda task: _native(task, stream=True), _events),
    "score": (
        "/v1/score",
        lambda t: {"model": "judge", "text_1": t.query, "text_2": list(t.responses)},
        _score,
    ),
    "rerank": (
        "/v1/rerank",
        lambda t: {"model": "judge", "query": t.query, "documents": list(t.responses)},
        _rerank,
    ),
    "compare": (
        "/compare",
        lambda t: {
            "conversation_history": [{"role": "user", "content": t.query}],
            "response_objs": _objects(t),
        },
        _compare,
    ),
    "chat": (
        "/v1/chat/completions",
        lambda t: {
            "model": "judge", "messages": [{"role": "user", "content": t.query}], "n": 2,
            "seed": t.number, "max_tokens": 16,
        },
        _chat,
    ),
    "classify": (
        "/classify",
        lambda t: {"model": "judge", "messages": _pair(t), "use_activation": False},
        _raw,
    ),
}  # fmt: skip
SHARES = {"judge": 8, "judge, events": 3, "score": 3, "rerank": 3, "compare": 2, "chat": 2,
          "classify": 1}  # fmt: skip


def make_tasks(args: Arguments, paths: set[str]) -> list[Task]:
    """The requests: of each row one, by a protocol that the server has, with 1 to 8 critiques."""
    rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    asked = {(row["turns"][-1]["content"], tuple(row["responses"])): None for row in rows}
    if len(asked) < args.requests:
        raise UserError(f"{args.rows} has {len(asked)} different rows; ask for fewer --requests")
    rng = random.Random(args.seed)
    names = [name for name, (path, *_) in PROTOCOLS.items() if path in paths]
    if args.scalar is None:
        names = [name for name in names if name != "classify"]
    tasks = []
    for number, (query, responses) in zip(range(args.requests), asked, strict=False):
        (protocol,) = rng.choices(names, [SHARES[name] for name in names])
        if protocol == "compare" and len(responses) == 1:
            protocol = "judge"  # NeMo Gym's route answers these without a judge
        tasks.append(Task(number, protocol, query, responses, rng.choice((1, 2, 4, 8))))
    return tasks


class Server:
    """A server's process, its memory, and its end."""

    def __init__(self, args: Arguments, port: int = 0):
        command = [sys.executable, "-u", "-m", "grm_jax.serve", "--model", args.model,
                   "--port", str(port), "--samples", str(args.samples), "-k", "4"]  # fmt: skip
        for name in ("meta", "scalar", "max_new_tokens"):
            if (value := getattr(args, name)) is not None:
                command += [f"--{name.replace('_', '-')}", str(value)]
        self.log = (Path(tempfile.gettempdir()) / "grm_jax-load.log").open("a")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        started = time.monotonic()
        self.url = ""
        assert self.process.stdout is not None
        while not self.url:
            line = self.process.stdout.readline()
            assert line, f"the server ended; see {self.log.name}"
            if line.startswith("serving "):
                self.url = line.split()[-1]
        self.seconds = time.monotonic() - started
        # What it logs is read, so that it never waits for a reader.
        self.reader = subprocess.Popen(
            ["cat"], stdin=self.process.stdout, stdout=subprocess.DEVNULL
        )

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def resident(self) -> float:
        """Resident memory in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024

    def metrics(self) -> dict[str, float]:
        text = httpx.get(self.url + "/metrics", timeout=60).text
        pairs = [line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#"]
        return {name: float(value) for name, value in pairs}

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        status = self.process.wait(180)
        self.reader.wait(30)
        self.log.close()
        return status


@dataclasses.dataclass
class Run:
    """What came of the requests: answers and seconds by number, retries, memory by the second."""

    answers: dict[int, Any] = dataclasses.field(default_factory=dict)
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)
    retries: int = 0
    resident: list[float] = dataclasses.field(default_factory=list)
    wall: float = 0.0


def _failed(reply: httpx.Response) -> bool:
    """Whether the judge had nothing to say of it, which trying again would not change."""
    return reply.status_code != 200 and reply.json()["error"]["type"] == "judgement_failed"


async def send(
    place: Callable[[], Server], tasks: list[Task], clients: int, *, again: bool = False
) -> Run:
    """Send the tasks from `clients` clients at once; each sends its next when it has an answer."""
    run, todo = Run(), iter(tasks)
    started = time.monotonic()

    async def client() -> None:
        async with httpx.AsyncClient(timeout=900) as http:
            for task in todo:
                await one(http, task)

    async def one(http: httpx.AsyncClient, task: Task) -> None:
        path, body, read = PROTOCOLS[task.protocol]
        begun = time.monotonic()
        while True:
            try:
                reply = await http.post(place().url + path, json=body(task))
                if reply.status_code == 200 or _failed(reply):
                    break
                assert again and reply.status_code in (429, 503), reply.text
            except httpx.TransportError:
                if not again:
                    raise
            run.retries += 1
            await asyncio.sleep(0.5)
        assert task.number not in run.answers, "answered twice"
        # No readable critique is an answer, too: the same in every run.
        found = reply.json()["error"] if _failed(reply) else read(task, reply)
        run.answers[task.number] = found
        run.seconds[task.number] = time.monotonic() - begun

    async def watch() -> None:
        while True:
            await asyncio.sleep(1)
            try:
                run.resident.append(place().resident())
            except (FileNotFoundError, ValueError):
                continue  # it is being started again

    watcher = asyncio.ensure_future(watch())
    try:
        await asyncio.gather(*(client() for _ in range(clients)))
    finally:
        watcher.cancel()
    run.wall = time.monotonic() - started
    assert sorted(run.answers) == [task.number for task in tasks], "an answer is lost"
    return run


def warm_up(server: Server, tasks: list[Task]) -> None:
    """Compile what the tasks need, with texts that no task has."""
    for k in (1, 8):
        body = {"query": " repeat 1", "responses": [t.responses[0] for t in tasks[:2]], "k": k}
        httpx.post(server.url + "/v1/judge", json=body, timeout=900).raise_for_status()
    strangers = [
        dataclasses.replace(task, number=-1 - i, query=f"{task.query} done")
        for i, task in enumerate(tasks[:: max(1, len(tasks) // 64)])
    ]
    asyncio.run(send(lambda: server, sorted(strangers, key=lambda t: t.number), 64))


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def figures(run: Run, tasks: list[Task]) -> dict[str, Any]:
    times = list(run.seconds.values())
    third = max(1, len(run.resident) // 3)
    by_protocol = {
        name: percentile([run.seconds[t.number] for t in tasks if t.protocol == name], 0.5)
        for name in sorted({task.protocol for task in tasks})
    }
    return {
        "requests": len(times),
        "wall_seconds": round(run.wall, 1),
        "requests_per_second": round(len(times) / run.wall, 2),
        "p50": round(percentile(times, 0.5), 3),
        "p99": round(percentile(times, 0.99), 3),
        "p50_by_protocol": {name: round(value, 3) for name, value in by_protocol.items()},
        "retries": run.retries,
        "resident_mib": {
            "first_third": round(statistics.median(run.resident[:third] or [0])),
            "last_third": round(statistics.median(run.resident[-third:] or [0])),
            "most": round(max(run.resident, default=0)),
        },
    }


def same(run: Run, reference: Run | None) -> int | None:
    """How many answers are bit for bit those of the reference; None without one."""
    if reference is None:
        return None
    return sum(run.answers[n] == reference.answers[n] for n in run.answers)


def alone(args: Arguments, tasks: list[Task], reference: Run | None) -> dict[str, Any]:
    server = Server(args)
    warm_up(server, tasks)
    some = tasks[: args.alone]
    run = asyncio.run(send(lambda: server, some, 1))
    found = figures(run, some) | {"same": same(run, reference)}
    return found | {"exit_status": server.end(), "seconds_to_ready": round(server.seconds, 1)}


def together(args: Arguments, tasks: list[Task]) -> tuple[dict[str, Any], Run]:
    server = Server(args)
    warm_up(server, tasks)
    before = server.metrics()
    run = asyncio.run(send(lambda: server, tasks, args.clients))
    after = server.metrics()
    name = 'grm_jobs_total{ended="finished"}'
    done = int(after[name] - before[name])
    shared = sum(
        int(after[f'grm_jobs_total{{ended="{how}"}}'] - before[f'grm_jobs_total{{ended="{how}"}}'])
        for how in ("shared", "cached")
    )
    found = figures(run, tasks)
    found |= {
        "finished_by_the_engine": done, "answered_from_an_equal_one": shared,
        "samples": int(after["grm_samples_total"] - before["grm_samples_total"]),
        "pending_at_the_end": int(after["grm_pending_samples"]),
        "exit_status": server.end(),
    }  # fmt: skip
    return found, run


def hung_up(args: Arguments, tasks: list[Task], reference: Run | None) -> dict[str, Any]:
    """Clients in processes of their own are killed while the others go on."""
    server = Server(args)
    warm_up(server, tasks)
    some = tasks[: max(args.clients, len(tasks) // 4)]
    killed = 0

    async def scenario() -> Run:
        nonlocal killed
        work = asyncio.ensure_future(send(lambda: server, some, args.clients))
        while not work.done():
            command = [sys.executable, __file__, "--model", args.model, "--rows", str(args.rows),
                       "--child", server.url]  # fmt: skip
            child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
            assert child.stdout is not None
            await child.stdout.readline()  # its requests are sent
            await asyncio.sleep(0.3)
            child.kill()
            await child.wait()
            killed += 1
        return await work

    run = asyncio.run(scenario())
    time.sleep(2)
    metrics = server.metrics()
    found = figures(run, some) | {
        "same": same(run, reference),
        "killed_clients": killed,
        "cancelled_requests": int(metrics['grm_jobs_total{ended="cancelled"}']),
        "pending_at_the_end": int(metrics["grm_pending_samples"]),
    }
    return found | {"exit_status": server.end()}


async def child(url: str, rows: Path) -> None:
    """Sixteen long requests, and a line once they are sent; it will be killed."""
    async with httpx.AsyncClient(timeout=900) as http:
        pid = os.getpid()
        bodies = [
            {"query": f"of {pid}, {i}", "responses": ["a", "b", "c"], "k": 32} for i in range(16)
        ]
        work = [asyncio.ensure_future(http.post(url + "/v1/judge", json=body)) for body in bodies]
        await asyncio.sleep(0.5)
        print("sent", flush=True)
        await asyncio.gather(*work)
        await asyncio.sleep(3600)


def killed(args: Arguments, tasks: list[Task], reference: Run | None) -> dict[str, Any]:
    """The server is killed twice amid the load and started again at its port."""
    current = [Server(args)]
    some = tasks[: max(args.clients, len(tasks) // 4)]
    kills = 0

    async def scenario() -> Run:
        nonlocal kills
        work = asyncio.ensure_future(send(lambda: current[0], some, args.clients, again=True))
        for _ in range(2):
            await asyncio.sleep(10)
            if work.done():
                break
            old = current[0]
            await asyncio.to_thread(old.end, signal.SIGKILL)
            current[0] = await asyncio.to_thread(Server, args, old.port)
            kills += 1
        return await work

    run = asyncio.run(scenario())
    found = figures(run, some) | {"same": same(run, reference), "kills": kills}
    return found | {"exit_status": current[0].end()}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"`{results['command']}`, {results['about']}.",
        "",
        "| | requests | clients | requests/s | p50 (s) | p99 (s) | answers as in \"together\" |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    names = {"alone": "one at a time", "together": "together", "hung_up": "clients killed",
             "killed": "server killed"}  # fmt: skip
    for name, shown in names.items():
        if (row := results["parts"].get(name)) is None:
            continue
        clients = 1 if name == "alone" else results["clients"]
        equal = "" if row.get("same") is None else f"{row['same']} of {row['requests']}"
        lines.append(
            f"| {shown} | {row['requests']} | {clients} | {row['requests_per_second']} | "
            f"{row['p50']} | {row['p99']} | {equal} |"
        )
    return "\n".join([*lines, "", *_sentences(results)]) + "\n"


def _sentences(results: dict[str, Any]) -> Iterator[str]:
    parts = results["parts"]
    if "together" in parts:
        row = parts["together"]
        memory = row["resident_mib"]
        yield (
            f"Together: {row['requests']} answers to {row['requests']} requests, each checked "
            f"to be of its request; the engine finished {row['finished_by_the_engine']} and drew "
            f"{row['samples']} samples. Resident memory, median of the first and of the last "
            f"third of the run: {memory['first_third']} and {memory['last_third']} MiB."
        )
        if "alone" in parts:
            ratio = row["requests_per_second"] / parts["alone"]["requests_per_second"]
            yield f"\nThroughput over one at a time: {ratio:.1f}x."
    if "hung_up" in parts:
        row = parts["hung_up"]
        yield (
            f"\nClients killed: {row['killed_clients']} processes with 16 requests each; the "
            f"server cancelled {row['cancelled_requests']} of theirs, and "
            f"{row['pending_at_the_end']} samples were pending two seconds after the end."
        )
    if "killed" in parts:
        row = parts["killed"]
        yield f"\nServer killed: {row['kills']} times; clients tried again {row['retries']} times."


def main() -> None:
    args = tyro.cli(Arguments, description=__doc__)
    if args.child is not None:
        asyncio.run(child(args.child, args.rows))
        return
    document = json.loads(
        (Path(grm_jax.__file__).parent / "serving" / "openapi.json").read_text(encoding="utf-8")
    )
    tasks = make_tasks(args, set(document["paths"]))
    results: dict[str, Any] = {
        "command": " ".join(["python experiments/serving/load.py", *sys.argv[1:]]).replace(
            str(args.rows.parent.parent), "RUN"
        ),
        "about": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, "
        f"Python {platform.python_version()}, grm_jax {grm_jax.__version__}",
        "clients": args.clients,
        "protocols": dict(Counter(task.protocol for task in tasks)),
        "parts": {},
    }
    reference = None
    if "together" in args.parts:
        results["parts"]["together"], reference = together(args, tasks)
        print(json.dumps(results["parts"]["together"]), flush=True)
    for name, part in (("alone", alone), ("hung_up", hung_up), ("killed", killed)):
        if name in args.parts:
            results["parts"][name] = part(args, tasks, reference)
            print(name, json.dumps(results["parts"][name]), flush=True)
    args.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
