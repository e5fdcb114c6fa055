"""The task of recall over long contexts, and the script that writes its records."""

import json

import pytest
from helpers.support import assert_one_error_line, run_script

from finchtune.data.values import BadRecord
from finchtune.evaluation.task import Choices
from finchtune.evaluation.tasks.recall import Recall


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recall")
    sizes = "--train 30 --test 5 --length 3000 --shortest 300 --keys 4".split()
    done = run_script("scripts/make_recall.py", *sizes, "--output", folder)
    assert done.returncode == 0, done.stderr
    return [
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("train.jsonl", "test.jsonl")
    ]


def test_the_number_is_given_once_at_the_beginning(records):
    train, test = records
    assert (len(train), len(test)) == (30, 5)
    for record in train + test:
        text, answer = record["question"], record["answer"]
        name = text.rpartition("What is ")[2].removesuffix("?")
        assert text.count(f"{name} is {answer}.") == 1
        assert text.index(f"{name} is {answer}.") < 60
        assert 300 <= len(text) == record["length"] <= 3100
    assert len({record["question"] for record in train + test}) == 35
    assert max(record["length"] for record in train) > 2 * min(r["length"] for r in train)


def test_scores_and_shares_by_length():
    task = Recall(Choices())
    right = task.score({"question": "x" * 100, "answer": "42"}, " 42.")
    wrong = task.score({"question": "x" * 1000, "answer": "42"}, "It is 4, or 42")
    assert (right["correct"], wrong["correct"], wrong["extracted"]) == (True, False, "4")
    summary = task.summary([right, wrong, wrong])
    assert summary["by_length"]["128"]["rate"] == 1
    assert summary["by_length"]["1024"] == summary["by_length"]["1024"] | {"right": 0, "of": 2}
    assert "below 128 100%, below 1024 0%" in task.line(summary)
    with pytest.raises(BadRecord, match="is no number"):
        task.check({"question": "x", "answer": "four"})


def test_sizes_that_cannot_be(tmp_path):
    for words in (["--keys", 0], ["--shortest", 5000], ["--digits", 0]):
        done = run_script("scripts/make_recall.py", "--train", 1, "--output", tmp_path, *words)
        assert_one_error_line(done, words[0])


def benchmark(train, test, words):
    return run_script("scripts/bench/recall.py", "--train", train, "--test", test, *words.split())


@pytest.mark.slow
@pytest.mark.parametrize("words", ["--steps 120", "--steps 50 --tokens characters --chunks 3"])
def test_the_benchmark_learns_what_stands_in_another_chunk(tmp_path, words):
    """A name and a digit: by gradients of the whole context, and not by those within a chunk."""
    sizes = "--train 640 --test 40 --length 60 --shortest 50 --keys 1 --digits 1 --distractors 0"
    made = run_script("scripts/make_recall.py", *sizes.split(), "--output", tmp_path)
    assert made.returncode == 0, made.stderr
    files = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    done = benchmark(*files, f"--scores 1 --seeds 0 --rate 5e-3 {words}")
    assert done.returncode == 0, done.stderr
    exact, truncated = map(json.loads, done.stdout.splitlines())
    assert (exact["bptt"], truncated["bptt"]) == ("exact", "truncated")
    assert exact["right"] > 0.5 > truncated["right"]


@pytest.mark.slow
@pytest.mark.parametrize("generation", [6, 7])
def test_the_benchmark_runs_on_a_few_records(tmp_path, generation):
    few, none = tmp_path / "few.jsonl", tmp_path / "none.jsonl"
    few.write_text(json.dumps({"question": "Ada is 4. What is Ada?", "answer": "4"}) + "\n")
    none.touch()
    words = f"--steps 2 --scores 1 --seeds 0 --generation {generation} --bptt exact"
    done = benchmark(few, few, words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 2
    assert_one_error_line(benchmark(none, few, words), "none.jsonl holds no records")
    assert "invalid choice" in benchmark(few, few, "--bptt exactly").stderr
