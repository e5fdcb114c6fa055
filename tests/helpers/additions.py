"""A base model, a small corpus of additions, and the flags that train the one on the other."""

import json
import random
from pathlib import Path

from helpers.support import metrics, save_model, small_model


def make_folder(path: Path, generation: int = 6, **sizes: int) -> Path:
    """Put base.pth and text.jsonl (question, answer, and both together as text) into a folder."""
    save_model(small_model(head_size=16, generation=generation, **sizes), path / "base.pth")
    rng = random.Random(0)
    with (path / "text.jsonl").open("w") as file:
        for _ in range(40):
            a, b = rng.randrange(10), rng.randrange(10)
            row = {"question": f"What is {a} plus {b}?", "answer": f"It is {a + b}."}
            file.write(json.dumps(row | {"text": " ".join(row.values())}) + "\n")
    return path


def flags(folder: Path, proj: str | Path, *more, base="base.pth", data="text.jsonl") -> list:
    """Flags of train.py for a run in `proj`, a name in the folder or a path."""
    return [
        *("--load_model", folder / base, "--data_file", folder / data, "--data_type", "jsonl"),
        *("--ctx_len", 64, "--lr_init", 1e-2, "--proj_dir", folder / proj, *more),
    ]


def losses(proj: Path) -> list[float]:
    return [row["loss"] for row in metrics(proj)]
