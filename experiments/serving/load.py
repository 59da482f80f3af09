"""A server under load, on a trained judge: nothing is lost, doubled or mixed up; how fast it is.

    python experiments/serving/load.py --model RUN --rows RUN/world/train.jsonl

Tasks of mixed size and protocol (`protocols.py`), each about texts of its own, so that every answer
can be told from every other. What is done with them, each on a server of its own:

    one at a time    the first of them, each after the one before
    together         all, from as many clients at once as asked
    hung up          while clients that ask the same server are killed (SIGKILL) amid their requests
    killed           while the server is killed (SIGKILL) and started again; clients try again

A task whose rollouts are requests of their own is tried again as a whole: a server that was killed
has forgotten which of them it had answered.

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
from protocols import PROTOCOLS, Task, state

import grm_jax
from grm_jax.errors import UserError

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
    """Tasks. Each is one HTTP request, or one for each of its rollouts."""
    clients: int = 64
    alone: int = 60
    """Tasks that are sent one at a time."""
    disturbed: int | None = None
    """Tasks that are sent while clients, or the server, are killed; None: all."""
    kill_every: float = 60.0
    """Seconds from when the server is ready until it is killed."""
    kills: int = 5
    """How often it is killed at most."""
    samples: int = 64
    """`--samples` of the server."""
    max_new_tokens: int | None = None
    seed: int = 0
    output: Path = HERE / "load"
    parts: tuple[str, ...] = ("alone", "together", "hung_up", "killed")
    child: str | None = None
    """Internal: the URL that a client, which will be killed, asks for ever."""


def make_tasks(args: Arguments, paths: set[str]) -> list[Task]:
    """One of each query, by a protocol that the server has, with 1 to 8 critiques."""
    rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    # Rollouts are put together by their query, so no two tasks have the same.
    asked = {row["turns"][-1]["content"]: tuple(row["responses"]) for row in rows}
    if len(asked) < args.requests:
        raise UserError(f"{args.rows} has {len(asked)} different queries; ask for fewer --requests")
    rng = random.Random(args.seed)
    shares = {
        name: protocol.share
        for name, protocol in PROTOCOLS.items()
        if protocol.path in paths and (args.scalar is not None or not protocol.scalar)
    }
    tasks = []
    for number, (query, responses) in zip(range(args.requests), asked.items(), strict=False):
        (protocol,) = rng.choices(list(shares), list(shares.values()))
        if len(responses) < PROTOCOLS[protocol].least:
            protocol = "judge"
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
    """What came of the tasks: answers and seconds by number, tries again, memory by the second."""

    answers: dict[int, Any] = dataclasses.field(default_factory=dict)
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)
    retries: int = 0
    resident: list[float] = dataclasses.field(default_factory=list)
    wall: float = 0.0


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

    async def tried(http: httpx.AsyncClient, task: Task) -> list[httpx.Response] | None:
        """The replies to all of a task's requests, sent at once; None where one has to be sent
        again."""
        url, requests = place().url, PROTOCOLS[task.protocol].requests(task)
        replies = await asyncio.gather(
            *(http.post(url + path, json=body) for path, body in requests), return_exceptions=True
        )
        found = []
        for reply in replies:
            if isinstance(reply, BaseException):
                if not (again and isinstance(reply, httpx.TransportError)):
                    raise reply
            elif (what := state(reply)) in ("answer", "failed"):
                found.append(reply)
            else:
                assert again and what == "busy", reply.text
        return found if len(found) == len(replies) else None

    async def one(http: httpx.AsyncClient, task: Task) -> None:
        begun = time.monotonic()
        while (replies := await tried(http, task)) is None:
            run.retries += 1
            await asyncio.sleep(0.5)
        assert task.number not in run.answers, "answered twice"
        if any(state(reply) == "failed" for reply in replies):
            run.answers[task.number] = "no readable critique"
        else:
            run.answers[task.number] = PROTOCOLS[task.protocol].read(task, replies)
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
    assert set(run.answers) == {task.number for task in tasks}, "an answer is lost"
    return run


def warm_up(server: Server, tasks: list[Task]) -> None:
    """Compile what the server's own warm-up leaves out (longer rows of the meta RM and the scalar
    RM), with texts that no task has."""
    strangers = [
        dataclasses.replace(task, number=-1 - i, query=f"{task.query} done")
        for i, task in enumerate(tasks[:: max(1, len(tasks) // 64)])
    ]
    asyncio.run(send(lambda: server, strangers, 64))


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
        "tasks": len(times),
        "requests": sum(len(PROTOCOLS[t.protocol].requests(t)) for t in tasks),
        "wall_seconds": round(run.wall, 1),
        "tasks_per_second": round(len(times) / run.wall, 2),
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


def compared(run: Run, reference: Run | None, tasks: list[Task]) -> dict[str, Any]:
    """How many answers are bit for bit those of the reference, and which are not."""
    if reference is None:
        return {}
    others = [t for t in tasks if run.answers[t.number] != reference.answers[t.number]]
    named = [f"{t.number}: {t.protocol}" for t in others[:20]]
    return {"same": len(tasks) - len(others), "others": named}


def alone(args: Arguments, tasks: list[Task], reference: Run | None) -> dict[str, Any]:
    server = Server(args)
    warm_up(server, tasks)
    some = tasks[: args.alone]
    run = asyncio.run(send(lambda: server, some, 1))
    found = figures(run, some) | compared(run, reference, some)
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
    some = tasks[: args.disturbed]
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
    found = (
        figures(run, some)
        | compared(run, reference, some)
        | {
            "killed_clients": killed,
            "cancelled_requests": int(metrics['grm_jobs_total{ended="cancelled"}']),
            "pending_at_the_end": int(metrics["grm_pending_samples"]),
        }
    )
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
    """The server is killed amid the load, again and again, and started again at its port."""
    current = [Server(args)]
    some = tasks[: args.disturbed]
    kills = 0

    async def scenario() -> Run:
        nonlocal kills
        work = asyncio.ensure_future(send(lambda: current[0], some, args.clients, again=True))
        for _ in range(args.kills):
            await asyncio.wait([work], timeout=args.kill_every)
            if work.done():
                break
            old = current[0]
            await asyncio.to_thread(old.end, signal.SIGKILL)
            current[0] = await asyncio.to_thread(Server, args, old.port)
            kills += 1
        return await work

    run = asyncio.run(scenario())
    found = figures(run, some) | compared(run, reference, some) | {"kills": kills}
    return found | {"exit_status": current[0].end()}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"`{results['command']}`, {results['about']}.",
        "",
        "| | tasks | requests | clients | tasks/s | p50 (s) | p99 (s) | as in \"together\" |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    names = {"alone": "one at a time", "together": "together", "hung_up": "clients killed",
             "killed": "server killed"}  # fmt: skip
    for name, shown in names.items():
        if (row := results["parts"].get(name)) is None:
            continue
        clients = 1 if name == "alone" else results["clients"]
        equal = "" if row.get("same") is None else f"{row['same']} of {row['tasks']}"
        lines.append(
            f"| {shown} | {row['tasks']} | {row['requests']} | {clients} | "
            f"{row['tasks_per_second']} | {row['p50']} | {row['p99']} | {equal} |"
        )
    return "\n".join([*lines, "", *_sentences(results)]) + "\n"


def _sentences(results: dict[str, Any]) -> Iterator[str]:
    parts = results["parts"]
    if "together" in parts:
        row = parts["together"]
        memory = row["resident_mib"]
        yield (
            f"Together: {row['tasks']} answers to {row['tasks']} tasks, each checked to be of its "
            f"task; the engine finished {row['finished_by_the_engine']} judgements and drew "
            f"{row['samples']} samples. Resident memory, median of the first and of the last "
            f"third of the run: {memory['first_third']} and {memory['last_third']} MiB."
        )
        if "alone" in parts:
            ratio = row["tasks_per_second"] / parts["alone"]["tasks_per_second"]
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
