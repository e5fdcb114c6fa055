"""Whether numbers are recalled over thousands of words: exact beside truncated gradients.

Trains small models from scratch on scripts/make_recall.py's records, their words or their
characters as tokens, the shortest records first. A context is read in `--chunks` equal chunks, so
that the numbers stand in the first and the question in the last. Prints, for each kind of gradient
and seed, the share of held-out records that are answered rightly, by step, and the processor time.
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from long_context import step
from random_models import add_generation, initialised, sizes_of

from finchtune.data.batch import Batch, padded
from finchtune.data.sampling import Segment
from finchtune.errors import UserError, run_cli
from finchtune.models import LanguageModel

TOKENS, ROWS = 8192, 32  # of a step, about; rows at most
WINDOW = 16  # a step draws from so great a part of the records, by length
GROWING = (0.5, 0.94)  # the part of the steps between which the records' length grows
WARMUP = 50
SCORED = 8  # held-out rows that are read at once

Record = dict[str, Any]


def words_of(record: Record) -> list[str]:
    """The words and signs of the question, and the answer."""
    return [*re.findall(r"\w+|[.?]", record["question"]), record["answer"]]


def characters_of(record: Record) -> list[str]:
    """The characters of the question, a space, and the answer's first."""
    return list(f"{record['question']} {record['answer'][0]}")


SPLITS = {"words": words_of, "characters": characters_of}


def read(path: Path, split: str) -> list[list[str]]:
    """The records, split into what becomes tokens, short ones first."""
    records = [SPLITS[split](json.loads(line)) for line in path.read_text().splitlines()]
    if not records:
        raise UserError(f"{path} holds no records")
    return sorted(records, key=len)


def batch_of(records: list[list[str]], tokens: dict[str, int]) -> Batch:
    """Rows whose only label is the answer, their last token."""
    segments = []
    for i, words in enumerate(records):
        ids = np.array([tokens[word] for word in words])
        mask = np.array([0] * (len(ids) - 1) + [1], np.uint8)
        segments.append(Segment(ids, mask, i))
    return padded(segments, max(len(segment.ids) - 1 for segment in segments))


def drawn(records: list[list[str]], part: float, order: torch.Generator) -> list[list[str]]:
    """Rows of a step when `part` of the steps are done: short records first, long ones last."""
    width = max(1, len(records) // WINDOW)
    grown = (part - GROWING[0]) / (GROWING[1] - GROWING[0])
    first = round(min(1.0, max(0.0, grown)) * (len(records) - width))
    n_rows = max(1, min(ROWS, TOKENS // len(records[first])))
    return [records[first + i] for i in torch.randint(width, (n_rows,), generator=order).tolist()]


def train(given: argparse.Namespace, seed: int, bptt: str) -> None:
    """Train a model, and print the share of right answers now and then."""
    began = time.process_time()
    records, held_out = (read(path, given.tokens) for path in (given.train, given.test))
    known = sorted({word for words in (*records, *held_out) for word in words})
    tokens = {word: i + 1 for i, word in enumerate(known)}
    sizes = sizes_of(given.generation, 2, given.channels, len(tokens) + 1, head_size=32)
    model = initialised(sizes, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), given.rate, (0.9, 0.98), weight_decay=0.0)
    order = torch.Generator().manual_seed(seed)
    for number in range(1, given.steps + 1):
        batch = batch_of(drawn(records, number / given.steps, order), tokens)
        step(model, batch, -(-batch.tokens.shape[1] // given.chunks), bptt == "exact")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = given.rate * min(1.0, number / WARMUP)
        optimizer.step()
        optimizer.zero_grad()
        if number % max(1, given.steps // given.scores) == 0:
            share = share_right(model, held_out, tokens)
            told = {"bptt": bptt, "seed": seed, "step": number, "right": share}
            print(json.dumps(told | {"seconds": round(time.process_time() - began)}), flush=True)


@torch.no_grad()
def share_right(model: LanguageModel, records: list[list[str]], tokens: dict[str, int]) -> float:
    right = 0
    for first in range(0, len(records), SCORED):
        batch = batch_of(records[first : first + SCORED], tokens)
        counted = batch.labels != -100
        logits = model.head(model.hidden(batch.tokens)[0][counted])
        right += int((logits.argmax(-1) == batch.labels[counted]).sum())
    return round(right / len(records), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_generation(parser)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--tokens", choices=SPLITS, default="words")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--scores", type=int, default=8, help="how often held-out records are read")
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-2)
    ways = ["exact", "truncated"]
    parser.add_argument("--bptt", nargs="+", choices=ways, default=ways)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for seed in given.seeds:
        for bptt in given.bptt:
            train(given, seed, bptt)


if __name__ == "__main__":
    run_cli(main)
