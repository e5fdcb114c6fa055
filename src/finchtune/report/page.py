"""report.html: one file that needs no other, for one run or several side by side."""

import json
import statistics
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from finchtune.files import atomic_path
from finchtune.report.chart import COLOURS, Line, chart
from finchtune.report.series import (
    RunLog,
    is_number,
    last_mean,
    method_of,
    name_of,
    read_run,
    smoothed,
)

CHARTS = (
    ("Gradient norm", "before clipping", "grad_norm", "log noisy"),
    ("Learning rate", "", "lr", ""),
    ("Speed", "tokens per second", "tokens_per_s", "noisy"),
    ("Memory", "peak of rank 0, MiB", "memory_mb", ""),
)
"""Title, unit, key of metrics.jsonl; `noisy`: each step is drawn thin and the mean over it."""


def write_report(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Write the report of these run folders to `output`. Damaged or unfinished runs are shown."""
    runs = [read_run(folder) for folder in folders]
    _tell_apart(runs, folders)
    with atomic_path(output) as temporary:
        temporary.write_text(page(runs), encoding="utf-8")
    return Path(output)


def _tell_apart(runs: list[RunLog], folders: Sequence[str | Path]) -> None:
    """Runs whose folders have the same name go by their paths."""
    names = [run.name for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if names.count(run.name) > 1:
            run.name = str(folder)


def page(runs: list[RunLog]) -> str:
    """The whole document."""
    own = files("finchtune.report")
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = [
        f"<header><p>finchtune</p><h1>{escape(title)}</h1>{legend(runs)}</header>",
        problems(runs),
        summary(runs),
        f'<section class="charts">{charts(runs)}</section>',
        configuration(runs),
        samples(runs),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{own.joinpath('report.css').read_text()}</style>"
        f"</head><body><main>{''.join(parts)}</main>"
        f"<script>{own.joinpath('report.js').read_text()}</script></body></html>\n"
    )


def legend(runs: list[RunLog]) -> str:
    """Which colour is which run; nothing for a single one."""
    if len(runs) == 1:
        return ""
    items = (f"<li>{mark(i)}{escape(run.name)}</li>" for i, run in enumerate(runs))
    return f'<ul class="legend">{"".join(items)}</ul>'


def mark(run: int) -> str:
    """A spot of a run's colour."""
    return f'<i class="mark s{run % COLOURS}"></i>'


def problems(runs: list[RunLog]) -> str:
    """What could not be read, if anything."""
    found = [f"{run.name}: {text}" for run in runs for text in run.problems]
    if not found:
        return ""
    return f'<ul class="problems">{"".join(f"<li>{escape(text)}</li>" for text in found)}</ul>'


def facts(run: RunLog) -> dict[str, str]:
    """What one looks for first; empty texts for what a run does not tell."""
    losses, held_out = run.values("loss"), run.points("val_loss")
    best = min(held_out, key=lambda point: point[1], default=None)
    speed, memory = run.values("tokens_per_s"), run.values("memory_mb")
    seconds = sum(run.values("seconds"))
    return {
        "Method": method_of(run.config),
        "Model": name_of(run.config, "load_model"),
        "Data": name_of(run.config, "data_file"),
        "Begun": str(run.facts.get("begun", "")),
        "Trained parameters": _count(run.facts.get("trained")),
        "Steps": _count(max(run.values("step"), default=None)),
        "Loss": f"{last_mean(losses):.4f}" if losses else "",
        "Best validation loss": f"{best[1]:.4f} at step {best[0]:,}" if best else "",
        "Tokens": _count(sum(run.values("tokens")) or None),
        "Tokens per second": _count(statistics.median(speed) if speed else None),
        "Peak memory": f"{max(memory):,.0f} MiB" if memory else "",
        "Training time": _duration(seconds) if seconds else "",
        "Skipped steps": f"{len(run.skipped):,}" if run.skipped else "",
    }


def _count(value: Any) -> str:
    return f"{value:,.0f}" if is_number(value) else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"


def summary(runs: list[RunLog]) -> str:
    """The facts that there are: cards for one run, a table for several."""
    found = [facts(run) for run in runs]
    names = [name for name in found[0] if any(one[name] for one in found)]
    if len(runs) == 1:
        cards = (f"<div><dt>{k}</dt><dd>{escape(found[0][k])}</dd></div>" for k in names)
        return f'<dl class="cards">{"".join(cards)}</dl>' if names else ""
    rows = [[escape(name), *(escape(one[name]) or "-" for one in found)] for name in names]
    return f"<section><h2>Overview</h2>{table(runs, rows)}</section>"


def table(runs: list[RunLog], rows: list[list[str]]) -> str:
    """A column for each run; the cells are HTML."""
    head = "".join(f"<th>{mark(i)}{escape(run.name)}</th>" for i, run in enumerate(runs))
    body = "".join(
        f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr><th></th>{head}</tr>{body}</table></div>'


def charts(runs: list[RunLog]) -> str:
    """Every curve of every run; the loss even where nothing is recorded."""
    drawn = [chart("Loss", "nats per token, each step and running mean", noisy(runs, "loss"))]
    held_out = [Line(run.name, run.points("val_loss"), i, dots=True) for i, run in enumerate(runs)]
    if any(line.points for line in held_out):
        drawn.append(chart("Validation loss", "nats per token", held_out))
    for title, unit, key, kind in CHARTS:
        plain = [Line(run.name, run.points(key), i) for i, run in enumerate(runs)]
        lines = noisy(runs, key) if "noisy" in kind else plain
        if any(line.points for line in lines):
            drawn.append(chart(title, unit, lines, log="log" in kind))
    return "".join(drawn)


def noisy(runs: list[RunLog], key: str) -> list[Line]:
    """A thin curve of each step and, over it, its running mean."""
    found = [(run.name, run.points(key), i) for i, run in enumerate(runs)]
    thin = [Line(name, points, i, faint=True) for name, points, i in found]
    return thin + [Line(name, smoothed(points), i) for name, points, i in found]


def configuration(runs: list[RunLog]) -> str:
    """What differs between several runs; the whole configuration of a single one, folded away."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    rows = [[str(key), *(_shown(run.config.get(key)) for run in runs)] for key in keys]
    if len(runs) == 1:
        body = table(runs, [[escape(cell) for cell in row] for row in rows])
        return f"<details><summary>Configuration</summary>{body}</details>" if rows else ""
    rows = [[escape(cell) for cell in row] for row in rows if len(set(row[1:])) > 1]
    body = table(runs, rows) if rows else "<p>none</p>"
    return f"<section><h2>Differences in configuration</h2>{body}</section>"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, skipkeys=True)


def samples(runs: list[RunLog]) -> str:
    """What the models wrote, the newest first."""
    found = []
    for i, run in enumerate(runs):
        for row in reversed(run.samples):
            where = f"step {row.get('step')}" + (f", {run.name}" if len(runs) > 1 else "")
            prompt, text = (escape(str(row.get(key, ""))) for key in ("prompt", "text"))
            found.append(
                f"<div class='sample'><h3>{mark(i)}{escape(where)}</h3>"
                f"<pre><b>{prompt}</b>{text}</pre></div>"
            )
    return f"<section><h2>Samples</h2>{''.join(found)}</section>" if found else ""
