"""Cases of runs: checkpoints, what a run records, YAML files of flags, the data's cache."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from changes import (
    VALUES,
    Named,
    at_random,
    bytes_changes,
    in_pth,
    json_changes,
    replaced,
    tensor_changes,
)
from harness import CHECKED, EITHER, READ, REFUSED, Case, Change
from samples import TRAIN

from finchtune.files import sha256, sums_text

RESUME = (*TRAIN, "--resume", "auto")
STEP = "run/checkpoints/step-2"
NEWEST = (*TRAIN, "--resume", STEP)
TRAINED = ("run/rwkv-0.pth",)
ODD_LINES = (
    *("[1]", "3", "null", "\n\n", '{"step": 1}', '{"step": "x"}', '{"step": 1e400}', "\ufeff"),
    *("[" * 50_000, "a: &a [*a]", "a: !!python/object:os.system {}"),
)
ODD_YAML = (
    *("a: &a [*a, *a]", "a: !!python/object/apply:os.system [id]", "- 1", "&a", "\t", "? {}"),
    *("ctx_len: 0x7f", "ctx_len: 1_0", "ctx_len: 12:30", "peft: on"),
)


def checkpoints(rng: random.Random, n: int) -> Iterator[Case]:
    """Every file of a checkpoint, by name and as the newest; and what is sealed but nonsense."""
    for file in ("state.pth", "manifest.json", "manifest.sha256"):
        for name, change, _ in bytes_changes(f"{STEP}/{file}", rng, n // 2):
            # An earlier checkpoint is there: `auto` continues from it, and ends alike.
            command, wanted = rng.choice(((RESUME, READ), (NEWEST, CHECKED)))
            yield Case(f"checkpoint, {file}", name, change, command, wanted, TRAINED)
    for name, change in sealed_manifests(rng, n):
        yield Case("checkpoint, sealed manifest", name, change, NEWEST, EITHER, TRAINED)
    for name, change, _ in tensor_changes(rng):
        changed = sealed_state(name, change)
        yield Case("checkpoint, sealed state", name, changed, NEWEST, EITHER, TRAINED)


def sealed_manifests(rng: random.Random, n: int) -> Iterator[tuple[str, Change]]:
    """Manifests of other values, with a checksum that fits."""
    file = f"{STEP}/manifest.json"
    for _ in range(n):
        seed, value = rng.getrandbits(32), rng.choice(VALUES)
        yield f"value {value!r:.20} ({seed})", at_random(file, seed, value, seal=seal)
    for _ in range(n // 2):
        seed = rng.getrandbits(32)
        yield f"key missing ({seed})", at_random(file, seed, seal=seal)


def sealed_state(name: str, change) -> Change:
    """Another state, with checksums that fit."""

    def changed(folder: Path) -> None:
        def inside(state: dict) -> dict:
            part = "exp_avg" if "exp_avg" in state else "trained"
            return state | {part: change(state[part])}

        in_pth(f"{STEP}/state.pth", inside)(folder)
        manifest = folder / STEP / "manifest.json"
        content = json.loads(manifest.read_text())
        content["sha256"] = {"state.pth": sha256(folder / STEP / "state.pth")}
        manifest.write_text(json.dumps(content))
        seal(folder)

    return changed


def seal(folder: Path) -> None:
    """Give a changed manifest its checksum."""
    digest = sha256(folder / STEP / "manifest.json")
    (folder / STEP / "manifest.sha256").write_text(sums_text({"manifest.json": digest}))


def recorded(rng: random.Random, n: int) -> Iterator[Case]:
    """What a run tells of itself: a report shows what can be read, and a run continues."""
    report = ("report", "run", "--output", "page.html")
    for file in ("metrics.jsonl", "skipped.jsonl", "samples.jsonl", "config.yaml"):
        kind = file
        path = f"run/{file}"
        changes = [*bytes_changes(path, rng, n // 2), *lines_changes(path, rng, n)]
        for name, change, _ in changes:
            there = first(written(path), change)
            yield Case(kind, name, there, report)
            if file != "samples.jsonl" and rng.random() < 0.3:
                odd = name in ("a folder", "a link to itself", "a link to nothing")
                yield Case(kind, name, there, RESUME, EITHER if odd else READ, TRAINED)


def written(path: str) -> Change:
    """Make sure that a file is there."""
    row = '{"step": 1, "loss": "nan", "documents": [1], "prompt": "a", "text": "b"}\n'

    def change(folder: Path) -> None:
        if not (folder / path).exists():
            (folder / path).write_text(row * 3)

    return change


def first(one: Change, two: Change) -> Change:
    """Both, one after the other."""

    def change(folder: Path) -> None:
        one(folder)
        two(folder)

    return change


def lines_changes(path: str, rng: random.Random, n: int) -> Named:
    """Lines of JSON of which one holds another value, and lines that are none."""
    for _ in range(n):
        seed, value = rng.getrandbits(32), rng.choice(VALUES)
        yield f"line value {value!r:.20} ({seed})", on_line(path, seed, value), EITHER
    for text in ODD_LINES:
        yield f"line {text[:20]!r}", replaced(path, text.encode()), EITHER


def on_line(path: str, seed: int, value: object) -> Change:
    """One value of one line replaced."""

    def change(folder: Path) -> None:
        rng = random.Random(seed)
        lines = (folder / path).read_text().splitlines()
        at = rng.randrange(len(lines))
        try:
            row = json.loads(lines[at])
            row[rng.choice(sorted(row))] = value
            lines[at] = json.dumps(row)
        except ValueError:  # of YAML
            key = lines[at].partition(":")[0]
            lines[at] = f"{key}: {json.dumps(value)}"
        (folder / path).write_text("\n".join(lines), errors="backslashreplace")

    return change


def configurations(rng: random.Random, n: int) -> Iterator[Case]:
    """A YAML file of flags."""
    plan = ("plan", "--config", "flags.yaml", "--plan", "1")
    changes = [*bytes_changes("flags.yaml", rng, n), *json_changes("flags.yaml", rng, 2 * n)]
    for text in ODD_YAML:
        changes.append((f"text {text!r}", replaced("flags.yaml", text.encode()), EITHER))
    changes.append(("aliases that unfold", replaced("flags.yaml", unfolding().encode()), REFUSED))
    for name, change, wanted in changes:
        yield Case("--config", name, change, plan, wanted)


def unfolding() -> str:
    """A small YAML of a billion elements."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    return "\n".join(lines)


def cache(rng: random.Random, n: int) -> Iterator[Case]:
    """What was tokenised: a damaged entry is made again, and training ends alike."""
    for suffix in ("bin", "idx", "json", "info.json", "sha256"):
        for name, change, _ in bytes_changes(f"cached.{suffix}", rng, n // 4):
            odd = name in ("a folder", "a link to itself", "a link to nothing")
            yield Case(f"data cache, .{suffix}", name, in_cache(suffix, change), RESUME,
                       EITHER if odd else READ, TRAINED)  # fmt: skip


def in_cache(suffix: str, change: Change) -> Change:
    """A change of the one entry's file with this ending."""

    def changed(folder: Path) -> None:
        found = sorted((folder / "run/data_cache").glob(f"*.{suffix}"), key=lambda p: len(p.name))
        path = found[0]
        shutil.move(path, folder / f"cached.{suffix}")
        change(folder)
        if (folder / f"cached.{suffix}").is_symlink() or (folder / f"cached.{suffix}").exists():
            shutil.move(folder / f"cached.{suffix}", path)

    return changed


RUNS = (checkpoints, recorded, configurations, cache)
