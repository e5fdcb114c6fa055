"""Small inputs of the scripts that repeat the paper's tables."""

import json
import random
from pathlib import Path

from helpers.support import save_model, small_model


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sums(n: int) -> list[dict]:
    """Records of GSM8K's form."""
    rng = random.Random(0)
    pairs = [(rng.randrange(10), rng.randrange(10)) for _ in range(n)]
    return [
        {"question": f"What is {a} plus {b}?", "answer": f"It is {a + b}.\n#### {a + b}"}
        for a, b in pairs
    ]


def problem(name: str) -> dict:
    """A record of HumanEval's form."""
    return {
        "task_id": name,
        "prompt": f"def {name}(x):\n",
        "canonical_solution": "    return x\n",
        "test": "def check(f):\n    assert f(1) == 1\n",
        "entry_point": name,
    }


def task(name: str) -> dict:
    """A record of MBPP's form."""
    code, tests = f"def {name}(x):\n    return x", [f"assert {name}(1) == 1"]
    return {"text": f"Write {name}.", "code": code, "test_list": tests}


def dialogue(number: int) -> dict:
    """A record of MT-Bench's form."""
    return {"question_id": number, "category": "math", "turns": ["Add 1 and 1.", "Add 1 again."]}


def paper_inputs(folder: Path, generation: int = 6) -> dict[str, Path]:
    """A small RWKV over bytes, sums to train on, and a file for each test."""
    math = [{"problem": "What is 1 + 1?", "solution": r"\boxed{2}"}]
    return {
        "model": save_model(
            small_model(n_layer=1, n_embd=64, generation=generation), folder / "base.pth"
        ),
        "gsm8k": write_lines(folder / "sums.jsonl", sums(40)),
        "math": write_lines(folder / "math.jsonl", math),
        "humaneval": write_lines(folder / "humaneval.jsonl", [problem("one"), problem("two")]),
        "mbpp": write_lines(folder / "mbpp.jsonl", [task(name) for name in "abcde"]),
        "mtbench": write_lines(folder / "mtbench.jsonl", [dialogue(1), dialogue(2)]),
    }
