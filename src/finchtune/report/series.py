"""What a run wrote, as series of points to draw; whatever state its folder is in."""

import json
import math
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from finchtune.config import as_words
from finchtune.errors import UserError
from finchtune.files import read_object, read_yaml

Points = list[tuple[float, float]]
FACTS = "run.json"
MAX_POINTS = 800  # drawn of one series; more would be finer than a screen's pixels


@dataclass
class RunLog:
    """A run's rows of metrics (dicts with `step`), configuration and samples, as far as readable.

    `facts` is what run.json tells of the model and of the day on which the run began. `skipped` are
    the steps left out because something was not finite, with their documents.
    `problems` has a line for everything that was missing or damaged.
    """

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def points(self, key: str) -> Points:
        """(step, value) of every row that has a finite number under `key`."""
        return [(row["step"], row[key]) for row in self.rows if is_number(row.get(key))]

    def values(self, key: str) -> list[float]:
        return [value for _, value in self.points(key)]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_run(folder: str | Path) -> RunLog:
    """Read a run's folder. Raises nothing for what is missing or damaged in it: it says so."""
    folder = Path(folder)
    log = RunLog(folder.resolve().name)
    log.rows = [row for row in _lines(folder / "metrics.jsonl", log) if is_number(row.get("step"))]
    if (folder / "samples.jsonl").exists():
        log.samples = _lines(folder / "samples.jsonl", log)
    if (folder / "skipped.jsonl").exists():
        log.skipped = _lines(folder / "skipped.jsonl", log)
    try:
        log.facts = read_object(folder / FACTS) if (folder / FACTS).exists() else {}
    except UserError as error:
        log.problems.append(error.line.removeprefix(f"{folder}/"))
    try:
        config = read_yaml(folder / "config.yaml")
        log.config = config if isinstance(config, dict) else {}
        if "train_type" in log.config:
            log.config["train_type"] = as_words(log.config["train_type"])
    except UserError as error:
        log.problems.append(error.line.removeprefix(f"{folder}/"))
    return log


def _lines(path: Path, log: RunLog) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; lines that are none are counted as a problem."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        log.problems.append(f"{path.name} cannot be read: {error}")
        return []
    rows, bad = [], 0
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    if bad:
        log.problems.append(f"{path.name}: {bad} of {len(lines)} lines are damaged and left out")
    return rows


def running_mean(values: list[float], window: int) -> list[float]:
    """Mean of each value and up to window - 1 before it."""
    sums = [0.0, *accumulate(values)]
    firsts = (max(0, i + 1 - window) for i in range(len(values)))
    return [(sums[i + 1] - sums[first]) / (i + 1 - first) for i, first in enumerate(firsts)]


def smoothed(points: Points) -> Points:
    """A mean in which a point counts the less the longer ago it is: over about a twentieth of all.

    Unlike a mean of the last so many it has no kink where a large value leaves them.
    """
    stays = 1 - 2 / (1 + max(1, len(points) // 20))
    total = weight = 0.0
    means = []
    for x, y in points:
        total, weight = stays * total + y, stays * weight + 1
        means.append((x, total / weight))
    return means


def last_mean(values: list[float]) -> float:
    """The mean of the last twentieth."""
    last = values[-max(1, len(values) // 20) :]
    return sum(last) / len(last)


def method_of(config: dict[str, Any]) -> str:
    """What a run's configuration trains, e.g. bone r 64; empty if it does not say."""
    peft = config.get("peft")
    rank = config.get(f"{peft}_r")
    states = ["states"] if "state" in (peft, *(config.get("train_type") or ())) else []
    if peft in ("none", "state"):
        return "".join(states) or "all weights"
    adapter = f"{peft} r {rank}" if rank is not None else str(peft or "")
    return ", ".join([adapter, *states])


def name_of(config: dict[str, Any], key: str) -> str:
    """The last part of a path in a run's configuration; empty if it does not say."""
    return Path(str(config.get(key) or "")).name


def thinned(points: Points) -> Points:
    """At most MAX_POINTS points: of each run of neighbours the lowest and the highest."""
    if len(points) <= MAX_POINTS:
        return points
    size = -(-len(points) // (MAX_POINTS // 2))
    kept = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept
