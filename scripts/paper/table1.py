"""Table 1: LoRA, PiSSA and Bone on a RoBERTa-base, by `finchtune.attach`, on five tasks of GLUE.

--data is a folder with one for each task (mnli, sst2, cola, qnli, mrpc), in it train* and
validation* (MNLI: validation_matched*) as .parquet or .jsonl with GLUE's own columns. Tasks that
are not there are left out. The score is accuracy, for CoLA Matthews' correlation: the paper speaks
of accuracy throughout, but its figures for CoLA are of the other's size.
"""

import argparse
from pathlib import Path

from cells import Cell, Pool, Step, places
from glue_data import TASKS, make_inputs
from study import Study, run
from tables import Column, Line, grid

from finchtune.errors import UserError, run_cli
from finchtune.files import read_json

PROGRAM = Path(__file__).with_name("glue.py")
SEEDS, SMOKE_SEEDS = (0, 1, 2), (0, 1)
SMOKE = "Smoke run on a tiny random model and made-up sentences: it shows that everything runs."
SMOKE_LR, SMOKE_EPOCHS = 5e-3, 3


def line(label: str, peft: str, r: int, *scores: float) -> Line:
    """A method with the paper's scores of the tasks in their order."""
    return Line(label, peft, r, dict(zip(TASKS, scores, strict=True)))


LINES = (
    line("LoRA", "lora", 8, 85.63, 94.03, 62.40, 91.37, 87.98),
    line("PiSSA", "pissa", 8, 85.72, 93.64, 67.28, 91.40, 88.11),
    line("Bone", "bone", 16, 85.71, 93.60, 72.86, 91.43, 88.14),
)
ALPHA = 16  # LoRA's, as its code has it; r 8, so the scale is 2


def main() -> int:
    given = parse()
    if given.smoke:
        given.model, given.data = make_inputs(given.output / "smoke")
    if not given.model or not given.data:
        raise UserError("give --model and --data, or --smoke alone")
    tasks = [name for name in TASKS if (Path(given.data) / name).is_dir()]
    if not tasks:
        raise UserError(f"--data {given.data}: holds none of the folders {', '.join(TASKS)}")
    study = study_of(given, tasks)
    if given.plan:
        print(plan(study))
        return 0
    return run(study, given.output, Pool(places(given.jobs, 1)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="folder of a RoBERTa with its tokenizer")
    add("--data", help="folder of GLUE's tasks")
    add("--output", required=True, type=Path, help="folder of cells and the table")
    add("--lrs", nargs="+", type=float, help="learning rates to try; default each task's own")
    add("--seeds", nargs="+", type=int, help=f"default {' '.join(map(str, SEEDS))}")
    add("--epochs", type=int, help="default each task's own")
    add("--limit", type=int, help="examples to train on")
    add("--jobs", type=int, default=1, help="cells side by side, each on a GPU of its own")
    add("--plan", action="store_true", help="train nothing; print how many steps there are")
    add("--smoke", action="store_true", help="a tiny random model and made-up sentences")
    given = parser.parse_args()
    for name in ("jobs", "epochs", "limit"):
        if (value := getattr(given, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    return given


def study_of(given: argparse.Namespace, tasks: list[str]) -> Study:
    """The cells and columns of the tasks."""
    return Study(
        "table1",
        "Table 1, RoBERTa-base on GLUE",
        LINES,
        [Column(name, TASKS[name].title, name, "training", "score", 100.0) for name in tasks],
        {
            name: tuple(given.lrs or ([SMOKE_LR] if given.smoke else [TASKS[name].lr]))
            for name in tasks
        },
        given.seeds or (SMOKE_SEEDS if given.smoke else SEEDS),
        lambda *chosen: cell(given, *chosen),
        about=SMOKE if given.smoke else f"Model: {Path(given.model).name}.",
    )


def cell(given: argparse.Namespace, task: str, line: Line, lr: float, seed: int) -> Cell:
    """One training, which scores itself."""
    folder = given.output / f"{task}-{line.peft}-r{line.r}-lr{lr:g}-seed{seed}"
    epochs = given.epochs or (SMOKE_EPOCHS if given.smoke else TASKS[task].epochs)
    settings = {
        "model": str(given.model),
        "data": str(Path(given.data) / task),
        "task": task,
        "peft": line.peft,
        "r": line.r,
        **({"alpha": ALPHA} if line.peft == "lora" else {}),
        "lr": lr,
        "epochs": epochs,
        "seed": seed,
        **({"limit": given.limit} if given.limit else {}),
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = (str(PROGRAM), *words, "--output", str(folder))
    return Cell(
        folder, (Step("training", command, settings, lambda: read_json(folder / "outcome.json")),)
    )


def plan(study: Study) -> str:
    """Steps and examples of each task, for all methods and seeds."""
    from glue_data import read_examples

    rows = []
    for name in study.rates:
        one = study.cell(name, LINES[0], study.rates[name][0], study.seeds[0]).steps[0].settings
        examples = len(read_examples(Path(one["data"]), TASKS[name], "train"))
        seen = min(examples, one.get("limit", examples)) * one["epochs"]
        trainings = len(LINES) * (len(study.rates[name]) + len(study.seeds) - 1)
        steps = -(-seen // TASKS[name].batch)
        rows.append([name, str(trainings), f"{steps:,}", f"{seen:,}", f"{trainings * seen:,}"])
    titles = ("task", "trainings", "steps of each", "examples of each", "examples of all")
    return grid(titles, rows)


if __name__ == "__main__":
    run_cli(main)
