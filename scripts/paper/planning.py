"""What a study costs, without training: memory, steps, disk, and time where a rate is known."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from language import COURSES, Inputs, training_flags, words
from study import Study
from tables import Line, grid

from finchtune.cli.flags import parse_train_flags
from finchtune.config import TrainConfig
from finchtune.evaluation.runner import read_records
from finchtune.memory.estimate import activations, estimate
from finchtune.training.plan import file_bytes, planned_batch, planned_sizes
from finchtune.training.precision import choose_precision
from finchtune.training.setup import model_plan

GIB = 1 << 30
KNOWN = {"lora": 15_600, "bone": 16_000, "bat": 14_200}
"""Tokens a second of an RWKV6-3B on four RTX 4090s with recomputation (the paper's table 6)."""
KNOWN_PARAMETERS = 3_100_000_000
TITLES = (
    *("course", "strategy", "trainings", "trained", "memory of a GPU, GiB"),
    *("steps", "million tokens", "hours of all", "disk of all, GiB"),
)


@dataclass(frozen=True)
class Cost:
    """Of a training, whatever it is trained on: parameters, and bytes of a GPU and of files."""

    frozen: int
    trained: int
    memory: int
    adapter: int
    checkpoint: int


def print_plan(study: Study, inputs: Inputs, rate: float | None) -> None:
    """A line for each line of the study and course, and the sum of the time."""
    rows, hours = [], 0.0
    for line in study.lines:
        config = config_of(study, inputs, line, next(iter(study.rates)))
        cost = cost_of(config, inputs.model)
        for course in study.rates:
            steps = steps_of(config_of(study, inputs, line, course), course)
            tokens = steps * config.global_bsz * config.ctx_len
            trainings = len(study.rates[course]) + len(study.seeds) - 1
            own = trainings * tokens / (rate or known_rate(line, cost)) / 3600
            disk = trainings * cost.adapter + cost.checkpoint
            rows.append(
                [
                    *(course, line.label, str(trainings), f"{cost.trained:,}"),
                    *(f"{cost.memory / GIB:.1f}", f"{steps:,}", f"{tokens / 1e6:,.0f}"),
                    *(f"{own:,.1f}", f"{disk / GIB:.1f}"),
                ]
            )
            hours += own
    print(f"{study.title}: each training on {inputs.devices} GPUs, {len(study.seeds)} seeds\n")
    print(grid(TITLES, rows))
    print(f"\n{hours:,.0f} hours of training in all, {source(rate)}")
    for text in questions(study):
        print(text)


def config_of(study: Study, inputs: Inputs, line: Line, course: str) -> TrainConfig:
    """The training of a line on a course."""
    flags = training_flags(inputs, course, line, study.rates[course][0], study.seeds[0])
    return planned_batch(parse_train_flags([*words(flags), "--plan"]))


def cost_of(config: TrainConfig, model: str) -> Cost:
    """What `finchtune plan` finds of memory and disk, on GPUs."""
    plan = model_plan(config, planned_sizes(model), choose_precision(config, "cuda"))
    memory = estimate(config, plan, config.devices, "cuda", activations(config, plan)).total
    sizes = [(p.numel(), p.requires_grad) for p in plan.model.parameters()]
    trained = sum(n for n, moves in sizes if moves)
    return Cost(
        sum(n for n, _ in sizes) - trained, trained, memory, *file_bytes(config, plan.model)
    )


def known_rate(line: Line, cost: Cost) -> float:
    """Tokens a second by the paper's rates of a 3B model."""
    return KNOWN.get(line.peft, KNOWN["lora"]) * KNOWN_PARAMETERS / cost.frozen


def steps_of(config: TrainConfig, course: str) -> int:
    """An epoch's steps: those asked for, else of the data given, else of as many as the paper's."""
    if config.epoch_steps:
        return config.epoch_steps
    given = config.data_file
    rows = sum(1 for _ in read_records(given)) if given else COURSES[course].rows
    return math.ceil(rows / config.global_bsz)


def source(rate: float | None) -> str:
    """Where the rate is from."""
    if rate:
        return f"at {rate:,.0f} tokens a second"
    return "at the rates of the paper's table 6 (four RTX 4090s), scaled by the model's size"


def questions(study: Study) -> Iterator[str]:
    """What is asked of the models."""
    tests = {column.title for column in study.columns if column.step != "training"}
    if tests:
        cells = len(study.lines) * len(study.seeds)
        yield f"evaluations not included: {', '.join(sorted(tests))}, each of {cells} adapters"
