"""MT-Bench (Zheng et al. 2023): 80 dialogues of two questions, to be judged by another model.

Nothing is scored here. `model_answer.jsonl` is what FastChat's judge reads, as
data/mt_bench/model_answer/NAME.jsonl of its folder.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finchtune.data.values import BadRecord
from finchtune.evaluation.task import Record, Row, Task

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""FastChat's, by category; the others are greedy."""


class MTBench(Task):
    """`question_id`, `category` and `turns`."""

    default_template = "chat"
    max_tokens = 1024
    fields = ("turns",)
    n_turns = 2
    has_examples = False

    def check(self, record: Record) -> None:
        """As in the base class."""
        turns = record.get("turns") if isinstance(record, dict) else None
        if not isinstance(turns, list) or [type(turn) for turn in turns] != [str, str]:
            raise BadRecord("the field 'turns' must be a list of two strings")
        if not isinstance(record.get("question_id"), int):
            raise BadRecord("the field 'question_id' must be a number")

    def prompt(self, record: Record, answers: Sequence[str]) -> str:
        """The dialogue so far and the next question."""
        assert self.template
        messages = []
        for turn, question in enumerate(record["turns"][: len(answers) + 1]):
            messages.append({"role": "user", "content": question})
            if turn < len(answers):
                messages.append({"role": "assistant", "content": answers[turn].strip()})
        return "".join(text for text, _ in self.template.turns(messages, ask=True))

    def temperature(self, record: Record) -> float:
        """That of the category."""
        return TEMPERATURES.get(record.get("category", ""), 0.0)

    def score(self, record: Record, completion: list[str]) -> Row:
        """What FastChat needs of the question; no score."""
        return {"question_id": record["question_id"], "category": record.get("category")}

    def summary(self, rows: Sequence[Row]) -> dict[str, Any]:
        """How many questions have answers."""
        return {"of": len(rows)}

    def line(self, summary: dict[str, Any]) -> str:
        """As in the base class."""
        return f"{summary['of']} dialogues answered, to be judged with FastChat"

    def write(self, rows: Sequence[Row], name: str, folder: Path) -> None:
        """Write the answers in FastChat's form; the same rows give the same file."""
        with (folder / "model_answer.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(fastchat_answer(row, name)) + "\n" for row in rows)


def fastchat_answer(row: Row, name: str) -> dict[str, Any]:
    """An answer as FastChat's gen_model_answer writes it, `tstamp` excepted, which is 0."""
    turns = [turn.strip() for turn in row["completion"]]
    unique = hashlib.sha256(json.dumps([row["question_id"], name, turns]).encode()).hexdigest()
    return {
        "question_id": row["question_id"],
        "answer_id": unique[:22],
        "model_id": name,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": 0.0,
    }
