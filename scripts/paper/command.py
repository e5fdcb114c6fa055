"""The command line of tables 2 to 6 and figures 5 and 6.

What follows a bare `--` are further flags of every `finchtune train`.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import language
from cells import Cell, Pool, places
from language import COURSES, Inputs
from pictures import loss_curves
from study import Study, run
from tables import Column, Line

from finchtune.errors import UserError

PAPER_LR = 2e-5
SMOKE_SHRINK = 8
SMOKE = "Smoke run: it shows that everything runs, not which method is better."


@dataclass(frozen=True)
class Declaration:
    """A table of the paper: its lines, what they are trained on, and its smoke run's size."""

    name: str
    title: str
    lines: Sequence[Line]
    courses: Sequence[str] = ("math",)
    tested: bool = True
    seeds: Sequence[int] = (0, 1)
    smoke_lrs: Sequence[float] = (3e-3,)
    smoke_seeds: Sequence[int] = (0,)
    columns: Callable[[Inputs, Sequence[str]], list[Column]] = language.columns
    read: Callable[[Cell], dict[str, Any]] = language.read
    draw: Callable[..., None] | None = loss_curves
    train: Mapping[str, Any] | None = None
    """Flags of `finchtune train` of this table alone."""


def main(table: Declaration) -> int:
    """Run a declared table's command line; returns the exit status."""
    mine, theirs = split(sys.argv[1:])
    given = parser(table).parse_args(mine)
    inputs = inputs_of(table, given, dict(table.train or {}) | pairs(theirs))
    study = study_of(table, given, inputs)
    if given.plan:
        from planning import print_plan  # slow to import

        print_plan(study, inputs, given.rate)
        return 0
    return run(study, inputs.output, Pool(places(given.jobs, given.devices)), table.draw)


def parser(table: Declaration) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=f"{table.title}.\n\n{__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = found.add_argument
    add("--model", required=True, help="base weights; with --plan also 3B or 7B")
    add("--output", required=True, type=Path, help="folder of cells and tables; may be shared")
    named = {"nargs": "+", "metavar": "NAME=FILE", "default": []}
    add("--data", **named, help=f"to train on, for {', '.join(table.courses)}")
    add("--test", **named, help="questions, for gsm8k, math, humaneval, mbpp, mtbench")
    add("--fields", nargs="+", metavar="NAME=A,B", default=[], help="of the records of --data")
    add("--lrs", nargs="+", type=float, help=f"learning rates to try; default {PAPER_LR:g}")
    add("--seeds", nargs="+", type=int, help=f"default {' '.join(map(str, table.seeds))}")
    add("--shrink", type=int, help="divide the ranks by this, for a small model")
    add("--limit", type=int, help="questions of each test")
    add("--tokens", type=int, help="most tokens of an answer")
    add("--jobs", type=int, default=1, help="cells side by side, each on GPUs of its own")
    add("--devices", type=int, default=1, help="GPUs of each training")
    add("--plan", action="store_true", help="train nothing; print what it would cost")
    add("--rate", type=float, help="--plan: tokens a second, where they are known")
    add("--smoke", action="store_true", help="a few steps and questions, for a small model")
    return found


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and those after a bare `--`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:at]), list(arguments[at + 1 :])


def pairs(arguments: Sequence[str]) -> dict[str, Any]:
    """Flags and their values, e.g. {"ctx_len": "256"}; several values are a list."""
    found: dict[str, list[str]] = {}
    for word in arguments:
        if word.startswith("--"):
            own = found.setdefault(word.removeprefix("--"), [])
        elif not found:
            raise UserError(f"after -- a flag of finchtune train is expected, not {word!r}")
        else:
            own.append(word)
    return {name: own[0] if len(own) == 1 else own for name, own in found.items()}


def named(flag: str, given: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE as a dictionary."""
    for word in given:
        if "=" not in word:
            raise UserError(f"--{flag} {word}: give it as NAME=..., such as math=FILE")
    return dict(word.split("=", 1) for word in given)


def inputs_of(table: Declaration, given: argparse.Namespace, train: Mapping[str, Any]) -> Inputs:
    """What the command line gives."""
    fields = named("fields", given.fields)
    for name in ("jobs", "devices", "shrink", "limit", "tokens"):
        if (value := getattr(given, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    return Inputs(
        model=given.model,
        output=given.output,
        data=named("data", given.data),
        tests=named("test", given.test) if table.tested else {},
        fields={name: text.split(",") for name, text in fields.items()}
        or (dict.fromkeys(COURSES, ("question", "answer")) if given.smoke else {}),
        train=train,
        shrink=given.shrink or (SMOKE_SHRINK if given.smoke else 1),
        limit=given.limit,
        tokens=given.tokens,
        devices=given.devices,
        smoke=given.smoke,
    )


def study_of(table: Declaration, given: argparse.Namespace, inputs: Inputs) -> Study:
    """The study that a declaration and a command line make."""
    courses = [name for name in table.courses if name in inputs.data or given.plan]
    if not courses:
        raise UserError(f"--data {table.courses[0]}=FILE is missing: what to train on")
    lrs = given.lrs or (table.smoke_lrs if given.smoke else (PAPER_LR,))
    seeds = given.seeds or (table.smoke_seeds if given.smoke else table.seeds)
    absent = [name for name in table.courses if name not in courses]
    about = [SMOKE] if given.smoke else []
    about.append(f"Model: {Path(inputs.model).name}.")
    about += [f"No --data for {', '.join(absent)}."] if absent else []
    return Study(
        table.name,
        table.title,
        table.lines,
        table.columns(inputs, courses),
        dict.fromkeys(courses, tuple(lrs)),
        list(seeds),
        lambda *chosen: language.cell(inputs, *chosen),
        table.read,
        " ".join(about),
    )
