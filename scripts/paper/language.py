"""Cells of tables 2 to 6: `finchtune train` on an RWKV, then `finchtune evaluate`.

The settings are the paper's (sections 4.2 and 5) and, for what it does not say, those of its
code: an epoch, 64 rows of 512 tokens a step, a constant learning rate of 2e-5, loss on all text.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cells import Cell, Step
from tables import Column, Line

from finchtune.errors import UserError
from finchtune.files import read_json

LAST, LAST_SHARE = 20, 0.05
"""The loss that a learning rate is chosen by is the mean of the last 5 % of the steps, at least 20.
In a single epoch every row is new when its loss is taken."""
WARM = 10  # steps before the speed counts

PAPER = {
    "ctx_len": 512,
    "dataload": "pad",
    "loss_mask": "pad",
    "micro_bsz": 16,
    "global_bsz": 64,
    "lr_schedule": "constant",
    "beta1": 0.9,
    "beta2": 0.99,
    "adam_eps": 1e-8,
    "grad_cp": 1,
    "strategy": "deepspeed_stage_1",
    "save_every": 200,
}
SMOKE = {
    "ctx_len": 256,
    "dataload": "get",
    "micro_bsz": 4,
    "global_bsz": 4,
    "epoch_steps": 30,
    "warmup_steps": 3,
    "save_every": 10,
}
RANK_FLAGS = {"bone": ("bone_r",), "bat": ("bat_r",), "pissa": ("pissa_r",)}
LORA_FLAGS = ("lora_r", "lora_alpha")  # the scale alpha / r is 1 at every rank


@dataclass(frozen=True)
class Test:
    """A figure of an evaluation: `finchtune evaluate --task`, and where its summary has it.

    `source` is the test whose file is read. `limit` and `tokens` are those of a smoke run.
    """

    title: str
    task: str
    key: str
    scale: float = 100.0
    source: str = ""
    flags: tuple[str, ...] = ()
    digits: int = 2
    limit: int = 16
    tokens: int = 48


@dataclass(frozen=True)
class Course:
    """What is trained on: the fields of its records, their template, how many there are."""

    title: str
    fields: tuple[str, ...]
    template: str
    rows: int
    tests: tuple[str, ...]


TESTS = {
    "gsm8k": Test("GSM8K", "gsm8k", "parity"),
    "math": Test("MATH", "math", "parity"),
    "humaneval": Test("HumanEval", "humaneval", "correct"),
    "mbpp": Test("MBPP", "mbpp", "correct", flags=("--shots", "3")),
    "mtbench": Test("MT-Bench", "mtbench", "judged", scale=1.0, limit=2),
    "loss": Test(
        "loss on GSM8K's test", "loss", "loss", scale=1.0, source="gsm8k", digits=3,
        flags=("--fields", "question", "answer"),
    ),
}  # fmt: skip
COURSES = {
    "math": Course("math", ("query", "response"), "metamath", 395_000, ("gsm8k", "math", "loss")),
    "code": Course("code", ("query", "answer"), "alpaca", 100_000, ("humaneval", "mbpp")),
    "chat": Course("chat", ("instruction", "output"), "chat", 70_000, ("mtbench",)),
}


@dataclass(frozen=True)
class Inputs:
    """Whatever the user gives, by course or test."""

    model: str
    output: Path
    data: Mapping[str, str]
    tests: Mapping[str, str]
    fields: Mapping[str, Sequence[str]] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    shrink: int = 1
    limit: int | None = None
    tokens: int | None = None
    devices: int = 1
    smoke: bool = False

    def __post_init__(self) -> None:
        for flag, given, known in (
            ("--data", self.data, COURSES),
            ("--fields", self.fields, COURSES),
            ("--test", self.tests, [name for name, test in TESTS.items() if not test.source]),
        ):
            if unknown := given.keys() - set(known):
                raise UserError(f"{flag} {min(unknown)}=...: known are {', '.join(known)}")


def training_flags(inputs: Inputs, course: str, line: Line, lr: float, seed: int) -> dict[str, Any]:
    """The flags of `finchtune train`, without the folder; a plan has no data."""
    r = line.r // inputs.shrink
    if not r:
        raise UserError(f"--shrink {inputs.shrink} leaves nothing of rank {line.r}")
    fields = list(inputs.fields.get(course, COURSES[course].fields))
    form = {"data_type": "sft", "sft_field": fields} if len(fields) > 1 else {"data_type": "jsonl"}
    return (
        {"load_model": inputs.model, "data_file": inputs.data.get(course, "")}
        | form
        | {"template": COURSES[course].template}
        | (SMOKE if inputs.smoke else PAPER)
        | {"lr_schedule": "constant", "peft": line.peft}
        | dict.fromkeys(RANK_FLAGS.get(line.peft, LORA_FLAGS), r)
        | dict(line.flags)
        | {"lr_init": lr, "random_seed": seed, "devices": inputs.devices}
        | dict(inputs.train)
    )


def words(flags: Mapping[str, Any]) -> tuple[str, ...]:
    """Flags as a command line has them."""
    found: list[str] = []
    for name, value in flags.items():
        if value != "":
            found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return tuple(found)


def cell(inputs: Inputs, course: str, line: Line, lr: float, seed: int) -> Cell:
    """The training of a line on a course, and the course's tests that files were given for."""
    flags = training_flags(inputs, course, line, lr, seed)
    name = line.name or line.peft
    folder = inputs.output / f"{course}-{name}-r{line.r // inputs.shrink}-lr{lr:g}-seed{seed}"
    run = folder / "train"
    kept = {"proj_dir": run, "data_cache": inputs.output / "tokens", "keep_last": 1}
    command = ("-m", "finchtune", "train", *words(flags | kept | {"resume": "auto"}))
    settings = {
        name: value for name, value in flags.items() if name not in ("devices", "micro_bsz")
    }
    training = Step("training", command, settings, lambda: trained(run), run / "checkpoints")
    tests = (test_step(inputs, folder, test) for test in given_tests(inputs, course))
    return Cell(folder, (training, *tests))


def given_tests(inputs: Inputs, course: str) -> list[str]:
    """The tests of a course that there is a file for."""
    return [name for name in COURSES[course].tests if (TESTS[name].source or name) in inputs.tests]


def test_step(inputs: Inputs, folder: Path, name: str) -> Step:
    """One test of a cell's adapter."""
    test = TESTS[name]
    limit = inputs.limit or (test.limit if inputs.smoke else None)
    tokens = inputs.tokens or (test.tokens if inputs.smoke else None)
    settings = {
        "data": inputs.tests[test.source or name],
        "limit": limit,
        **({} if name == "loss" else {"tokens": tokens}),
    }
    asked = {
        "task": test.task,
        "model": inputs.model,
        "peft_checkpoint": folder / "train" / "rwkv-0.pth",
        "output": folder / name,
    } | {key: value for key, value in settings.items() if value is not None}
    command = ("-m", "finchtune", "evaluate", *words(asked), *test.flags)
    return Step(name, command, settings, lambda: scored(folder / name))


def trained(run: Path) -> dict[str, Any]:
    """What a finished training has to tell, from its metrics and its adapter file."""
    from finchtune.weights.adapter_files import read_adapter

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    last = losses[-max(LAST, int(len(losses) * LAST_SHARE)) :]
    warm = rows[WARM:] or rows
    tensors = read_adapter(run / "rwkv-0.pth")
    return {
        # Beside what is trained a file may hold what PiSSA, OLoRA and DoRA begin from.
        "trained": sum(t.numel() for name, t in tensors.items() if ".init_" not in name),
        "steps": len(rows),
        "choice": statistics.fmean(last),
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in warm),
        "memory_mb": max(row["memory_mb"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
    }


def scored(folder: Path) -> dict[str, Any]:
    """A finished evaluation's summary, as one value for each score."""
    summary = read_json(folder / "summary.json")
    return {
        name: value["rate"] if isinstance(value, dict) else value for name, value in summary.items()
    }


def read(cell: Cell) -> dict[str, dict[str, Any]]:
    """A finished cell's results, with MT-Bench's mean score if a judge has given any.

    `mtbench/judgment.jsonl` is what FastChat's gen_judgment.py writes of the cell's answers, a
    `score` for each question and turn, -1 where the judge gave none.
    """
    found, path = cell.results(), cell.folder / "mtbench" / "judgment.jsonl"
    if path.exists():
        scores = [json.loads(line)["score"] for line in path.read_text().splitlines()]
        found["mtbench"] |= {"judged": statistics.fmean(s for s in scores if s >= 0)}
    return found


def columns(inputs: Inputs, courses: Sequence[str]) -> list[Column]:
    """A column for each test of the courses, and the loss that ends the training of the first."""
    first = Column("last", "last losses", courses[0], "training", "choice", digits=3)
    return [
        first,
        *(
            Column(name, test.title, course, name, test.key, test.scale, test.digits)
            for course in courses
            for name in given_tests(inputs, course)
            for test in [TESTS[name]]
        ),
    ]
