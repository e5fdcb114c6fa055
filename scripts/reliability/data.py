"""Cases of data: pairs with masks and notes, records, tokenizers, tasks and their answers."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from changes import Named, bytes_changes, json_changes, replaced
from harness import EITHER, REFUSED, Case, Change
from runs import lines_changes

INSPECT = ("inspect", "--tokenizer", "bytes", "--data_file")


def pairs(rng: random.Random, n: int) -> Iterator[Case]:
    """A .bin/.idx pair, the pair of its mask, and the note of what made it."""
    for file in ("bare.bin", "bare.idx", "data.bin", "data.idx", "data.mask.bin", "data.mask.idx"):
        # What is read rightly is held by tests/data/test_fuzz.py, with an independent reader.
        for name, change, wanted in bytes_changes(file, rng, n // 2):
            gone = wanted == REFUSED and not file.startswith("data.mask")
            yield Case(file, name, change, (*INSPECT, file.partition(".")[0]),
                       REFUSED if gone and "zeros" not in name else EITHER)  # fmt: skip
    changes = [
        *bytes_changes("data.info.json", rng, n // 2),
        *json_changes("data.info.json", rng, n),
    ]
    for name, change, _ in changes:
        yield Case("data.info.json", name, change, (*INSPECT, "data"))


def records(rng: random.Random, n: int) -> Iterator[Case]:
    """Text to prepare."""
    words = ("prepare", "--input", "qa.jsonl", "--output", "made", "--tokenizer", "bytes")
    words = (*words, "--sft_field", "question", "answer", "--workers", "1")
    changes = [*bytes_changes("qa.jsonl", rng, n), *lines_changes("qa.jsonl", rng, n)]
    for name, change, _ in changes:
        yield Case("records", name, change, words)
    for suffix in ("json", "csv", "tsv", "txt", "parquet", "jsonl.gz", "jsonl.zst"):
        for name, change, _ in bytes_changes(f"odd.{suffix}", rng, max(2, n // 8)):
            command = ("prepare", "--input", f"odd.{suffix}", "--output", "made", "--workers", "1")
            yield Case(f"records, .{suffix}", name, there(f"odd.{suffix}", change),
                       (*command, "--tokenizer", "bytes"))  # fmt: skip


def there(name: str, change: Change) -> Change:
    """A change of a file of text with that ending, written first."""

    def changed(folder: Path) -> None:
        write_like(folder / name)
        change(folder)

    return changed


def write_like(path: Path) -> None:
    """A good file of the kind that the ending says."""
    import gzip

    import pyarrow
    import pyarrow.parquet
    import zstandard

    rows = [{"text": f"{a} plus one"} for a in range(20)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    ending = path.name.partition(".")[2]
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    path.write_bytes({
        "json": lambda: json.dumps(rows).encode(),
        "csv": lambda: b"text,n\n" + b"one,1\n" * 20,
        "tsv": lambda: b"text\tn\n" + b"one\t1\n" * 20,
        "txt": lambda: lines,
        "jsonl.gz": lambda: gzip.compress(lines),
        "jsonl.zst": lambda: zstandard.compress(lines),
    }[ending]())  # fmt: skip


PATTERNS = (
    *("(a+)+$", "(a|a)*b", "(.*)*x", "(?:a?){40}a{40}", "((((a*)*)*)*)*b", "(\\w+\\s?)+$"),
    *("(?=(a+))\\1b", "(", "[z-a]", "(?P<n>", "a{1000000}", "((a{1,1000}){1,1000}){1,1000}", ""),
)


def tokenizers(rng: random.Random, n: int) -> Iterator[Case]:
    """A tokenizer.json: its bytes, its values, and patterns that search for ever."""
    words = ("prepare", "--input", "text.jsonl", "--output", "made", "--workers", "1")
    words = (*words, "--tokenizer", "tokenizer.json")
    changes = [*bytes_changes("tokenizer.json", rng, n // 2)]
    changes += [*json_changes("tokenizer.json", rng, n)]
    for name, change, _ in changes:
        yield Case("tokenizer.json", name, change, words)
    for pattern in PATTERNS:
        for kind in ("Split", "Replace"):
            change = with_pattern(kind, pattern)
            yield Case("tokenizer.json, patterns", f"{kind} {pattern}", change, words)


def with_pattern(kind: str, pattern: str) -> Change:
    """A tokenizer.json that searches every text for a pattern, and a text to search."""

    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        part = {"type": kind, "pattern": {"Regex": pattern}}
        if kind == "Split":
            content["pre_tokenizer"] = part | {"behavior": "Isolated", "invert": False}
        else:
            content["normalizer"] = part | {"content": "x"}
        path.write_text(json.dumps(content))
        text = "a" * 20_000 + " " * 500 + "word " * 500
        (folder / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")

    return change


def tasks(rng: random.Random, n: int) -> Iterator[Case]:
    """Questions and answers to score."""
    words = ("evaluate", "--task", "gsm8k", "--data", "qa.jsonl", "--output", "scored")
    answers = '{"completion": "#### 1"}\n' * 6

    def with_answers(change: Change) -> Change:
        def changed(folder: Path) -> None:
            (folder / "answers.jsonl").write_text(answers)
            change(folder)

        return changed

    for file in ("qa.jsonl", "answers.jsonl"):
        changes: list = [*bytes_changes(file, rng, n // 4), *lines_changes(file, rng, n // 2)]
        for name, change, _ in changes:
            command = (*words, "--answers", "answers.jsonl")
            yield Case(f"evaluate, {file}", name, with_answers(change), command)


def templates(rng: random.Random, n: int) -> Iterator[Case]:
    """Templates of one's own."""
    good = {"user": "Q: {question}\n", "answer": "A: {answer}\n"}
    words = ("prepare", "--input", "qa.jsonl", "--output", "made", "--tokenizer", "bytes")
    words = (*words, "--sft_field", "question", "answer", "--template", "own.json")

    def after(change: Change) -> Change:
        def changed(folder: Path) -> None:
            (folder / "own.json").write_text(json.dumps(good))
            change(folder)

        return changed

    changes: Named = json_changes("own.json", rng, n // 2)
    for name, change, _ in changes:
        yield Case("template", name, after(change), words)
    yield Case("template", "text", after(replaced("own.json", b"\x00{")), words)


DATA = (pairs, records, tokenizers, tasks, templates)
