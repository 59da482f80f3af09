"""Judge responses: a file of rows, or one query from the command line.

    python -m grm_jax.judge --model RUN --input rows.jsonl --output scored.jsonl -k 8
    python -m grm_jax.judge --model RUN --query "2 + 2?" --response 4 --response 5
    producer | python -m grm_jax.judge --model google/gemma-2-2b-it --input - --output scored.jsonl

Rows have any of the shapes that training and evaluation read; labels are not needed. Each row is
written again with a `verdict`: scores, winner, rewards, agreement, and every critique. A run that
was stopped goes on with the same command. Exit status: 0 (also when stopped by SIGTERM), 1 for what
can be mended (one line says how), 2 for wrong arguments, 3 where all is written and a row has no
scores, 130 when stopped by Ctrl-C.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which would be done twice
    from grm_jax.parallel.host import use_huge_pages

    use_huge_pages()

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from grm_jax import stopping
from grm_jax.errors import UserError, describe, listed
from grm_jax.judge.request import ScoreOptions
from grm_jax.model.options import ComputeDtype
from grm_jax.output import surviving
from grm_jax.parallel.options import MeshConfig

FAILED = 3  # exit status


@dataclasses.dataclass(frozen=True)
class Options(ScoreOptions):
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 8
    """Critiques that are sampled of each row."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: str
    """A run, a stage's directory, a Hugging Face folder, or a repo id of the hub."""
    meta: str | None = None
    """A meta RM, which guides the vote."""
    scalar: str | None = None
    """A scalar RM, whose scores stand beside the votes (--method hybrid adds them)."""
    input: str | None = None
    """Rows to judge: a file, a directory, a pattern, or - for standard input."""
    output: Path | None = None
    """Where rows with verdicts go, a line each."""
    query: str | None = None
    """One query, in place of --input."""
    response: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A response to --query; give the option once a response."""
    reference: str | None = None
    """An answer to judge --query's responses against."""
    criteria: str | None = None
    """What counts, in words: added to the principles of every row."""
    html: Path | None = None
    """Also write a page that shows the verdicts and their critiques."""
    critiques: bool = True
    """Write the critiques; --no-critiques leaves scores and failures."""
    skip_bad_rows: bool = False
    """Give rows that can not be judged a verdict that says why, in place of an error."""
    options: Annotated[Options, tyro.conf.arg(name="")] = Options()
    mesh: MeshConfig = MeshConfig()
    """How devices are used."""
    compute_dtype: ComputeDtype = "auto"
    """The dtype that models are computed in. auto: the checkpoint's own, unless it is bfloat16 and
    this is a CPU that is not at least 1.5 times as fast in it."""


def run(args: Arguments) -> int:
    """Judge and write; the exit status. Raises UserError and OSError for the user."""
    check(args)
    # Only here, so that wrong arguments and --help need no JAX.
    from grm_jax.judge.judge import Judge
    from grm_jax.metrics import setup_logging
    from grm_jax.train import setup_mesh

    mesh = setup_mesh(args.mesh)
    setup_logging()
    judge = Judge.load(
        args.model, args.meta, args.scalar, mesh=mesh, compute_dtype=args.compute_dtype
    )
    return _one(args, judge) if args.input is None else _file(args, judge)


def check(args: Arguments) -> None:
    """Raise UserError for arguments that say nothing, or too much."""
    if (args.input is None) == (args.query is None):
        raise UserError("give --input (a file of rows) or --query (with --response), one of both")
    if args.query is not None and not args.response:
        raise UserError("--query: give at least one --response")
    if args.input is not None:
        if args.response or args.reference is not None:
            raise UserError("--response and --reference belong to --query; rows have their own")
        if args.output is None:
            raise UserError("--input: give --output, where the rows with verdicts go")
    for name in ("output", "html"):
        path = getattr(args, name)
        if path is not None and path.is_dir():
            raise UserError(f"--{name} {path}: a directory; give a file")


def _one(args: Arguments, judge) -> int:
    from grm_jax.judge.page import write_page
    from grm_jax.judge.request import JudgeRequest

    assert args.query is not None
    request = JudgeRequest.make(
        args.query, args.response, reference=args.reference, criteria=args.criteria,
        options=args.options,
    )  # fmt: skip
    (verdict,) = judge.score_many([request])
    said = verdict.to_json(critiques=args.critiques)
    if args.output is not None:
        row = {"query": args.query, "responses": list(args.response), "verdict": said}
        args.output.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.html is not None:
        write_page(args.html, [(args.query, args.response, said)], title=args.model)
    _print(verdict)
    return FAILED if verdict.failure else 0


def _print(verdict) -> None:
    if verdict.failure is not None:
        print(f"no scores: {verdict.failure} ({verdict.failures})")
    for index, (score, reward) in enumerate(zip(verdict.scores, verdict.rewards, strict=True)):
        mark = "*" if index in verdict.best else " "
        print(
            f"{mark} response {index}: {score:.2f} +- {verdict.std[index]:.2f}, reward {reward:.2f}"
        )
    for row in verdict.critiques:
        said = row.failure if row.scores is None else list(row.scores)
        shown = " ".join(str(list(group)) for group in row.shown)
        print(f"\n--- critique {row.sample}, responses shown as {shown}: {said}")
        print(row.text.strip())


def _file(args: Arguments, judge) -> int:
    from grm_jax.judge.page import write_file_page
    from grm_jax.judge.score_file import read_tasks, score_file

    assert args.input is not None and args.output is not None
    tasks = read_tasks(
        args.input, args.options, judge, criteria=args.criteria, skip_bad_rows=args.skip_bad_rows
    )
    summary = score_file(judge, tasks, args.output, texts=args.critiques)
    if args.html is not None:
        write_file_page(args.html, args.output, title=args.model)
    scored = summary.rows - summary.failed
    print(f"{scored:,} of {summary.rows:,} rows have scores; written to {args.output}")
    for name, places in sorted(summary.failures.items()):
        print(f"{name}: {len(places)}: {listed(places)}")
    return FAILED if summary.failed else 0


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring for the exit status."""
    with surviving(), stopping.handled():
        try:
            args = tyro.cli(
                Arguments, args=argv, prog="python -m grm_jax.judge", description=__doc__
            )  # fmt: skip
            status = run(args)
        except KeyboardInterrupt as signal:
            print("judge: stopped; the same command goes on from there", file=sys.stderr)
            sys.exit(stopping.exit_code(stopping.terminated(signal)))
        except (UserError, OSError) as error:
            sys.exit(f"judge: {describe(error)}")
    sys.exit(status)


if __name__ == "__main__":
    main()
