"""finchtune evaluate: whole runs, resumed ones, and mistakes."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers.adapted import make_adapter
from helpers.support import (
    REPOSITORY,
    run_script,
    save_model,
    script_command,
    small_model,
)

from finchtune.data import templates
from finchtune.inference.generate import generate_batch
from finchtune.tokenizer import BytesTokenizer
from finchtune.weights.adapter_files import read_adapter, save_adapter

SCRIPT = REPOSITORY / "scripts" / "evaluate.py"
QUESTIONS = [
    {"question": f"What is {i} and {i}?", "answer": f"{i} + {i} = {2 * i}.\n#### {2 * i}"}
    for i in range(150)
]


MISTAKES = [
    (["--limit", 0], "--limit must be at least 1"),
    (["--shots", 150], "holds 150 questions, 150 of them for --shots"),
    (["--samples", 2], "--samples is for the tasks humaneval and mbpp"),
    (["--fields", "question", "none"], "questions.jsonl:1: there is no field 'none'"),
    (["--data", "/none.jsonl"], "/none.jsonl: no such file"),
    (["--template", "none"], "--template none"),
    (["--model", "m.pth"], "give either --model, to be asked, or --answers"),
    (["--task", "loss"], "the task loss asks a model"),
    (["--limit", 2], "150 answers for 2 questions"),
]


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "questions.jsonl", QUESTIONS)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(small_model(), tmp_path_factory.mktemp("model") / "m.pth")


@pytest.fixture(scope="module")
def whole(data, model, tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted; its groups are of 64 answers."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    done = run_script("scripts/evaluate.py", *flags(data, model, folder))
    assert done.returncode == 0, done.stderr
    assert "gsm8k, m: " in done.stdout
    assert " of 150 right" in done.stdout
    return folder


def flags(data, model, folder) -> list:
    return [
        *("--task", "gsm8k", "--data", data, "--model", model, "--tokens", 24, "--output", folder)
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_hold_what_was_asked_and_found(whole):
    rows = read_lines(whole / "answers.jsonl")
    assert [row["index"] for row in rows] == list(range(150))
    assert rows[3]["prompt"].endswith("What is 3 and 3?\n\n### Response: Let's think step by step.")
    assert {"completion", "extracted", "gold", "correct", "parity", "repaired"} <= set(rows[3])
    assert rows[3]["gold"] == "6"
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["correct"]["of"] == 150


class TestGiven:
    """Answers from a file, scored in this process."""

    SCRIPT = SCRIPT

    def test_gold_answers_are_right(self, run, data, tmp_path):
        answers = [{"completion": row["answer"]} for row in QUESTIONS]
        given = write_lines(tmp_path / "gold.jsonl", answers)
        flags = ["--task", "gsm8k", "--data", data, "--answers", given, "--output", tmp_path / "o"]
        status, printed, _ = run(*flags)
        assert (status, "150 of 150 right, 100.0%" in printed) == (0, True)
        assert run(*flags)[:2] == (0, printed)  # nothing is left to do

    def test_answers_of_a_run_can_be_scored_again(self, run, data, whole, tmp_path):
        again = ["--task", "exact", "--data", data, "--answers", whole / "answers.jsonl"]
        assert run(*again, "--output", tmp_path / "again")[0] == 0
        assert len(read_lines(tmp_path / "again" / "answers.jsonl")) == 150

    def test_examples_are_shown_and_not_asked(self, run, data, tmp_path):
        given = write_lines(tmp_path / "a.jsonl", [{"completion": ""}] * 3)
        flags = ["--task", "gsm8k", "--data", data, "--answers", given, "--output", tmp_path / "o"]
        assert run(*flags, "--shots", 2, "--limit", 3)[0] == 0
        prompt = read_lines(tmp_path / "o" / "answers.jsonl")[0]["prompt"]
        assert prompt.count("### Instruction:") == 3
        assert "The answer is: 2\n\nBelow" in prompt
        assert prompt.endswith("What is 2 and 2?\n\n### Response: Let's think step by step.")

    def test_dialogues_are_written_as_fastchat_reads_them(self, run, tmp_path):
        data = write_lines(
            tmp_path / "q.jsonl",
            [{"question_id": 81, "category": "writing", "turns": ["a", "b"]}],
        )
        given = write_lines(tmp_path / "mine.jsonl", [{"completion": [" x\n", "y"]}])
        flags = ["--task", "mtbench", "--data", data, "--answers", given, "--output", tmp_path]
        assert run(*flags)[0] == 0
        (answer,) = read_lines(tmp_path / "model_answer.jsonl")
        assert answer["choices"] == [{"index": 0, "turns": ["x", "y"]}]
        assert (answer["question_id"], answer["model_id"]) == (81, "mine")
        assert len(answer["answer_id"]) == 22

    @pytest.mark.parametrize(("added", "message"), MISTAKES)
    def test_mistake_is_one_line_and_writes_nothing(self, run, data, tmp_path, added, message):
        given = write_lines(tmp_path / "a.jsonl", [{"completion": ""}] * 150)
        flags = ["--task", "gsm8k", "--data", data, "--answers", given, "--output", tmp_path / "o"]
        status, _, errors = run(*flags, *added)
        assert status == 2
        assert errors.startswith("error: ")
        assert message in errors
        assert not (tmp_path / "o").exists()

    def test_folder_of_another_evaluation_is_refused(self, run, data, whole, model):
        before = contents(whole)
        status, _, errors = run(*flags(data, model, whole), "--strict_parity")
        assert status == 2
        assert "holds an evaluation with another strict_parity (False, now True)" in errors
        assert contents(whole) == before

    def test_adapter_is_used_and_the_template_that_it_was_trained_with(self, run, data, tmp_path):
        base, adapted, adapter = make_adapter(tmp_path, "bone", {"r": 8})
        record = json.loads(adapter.with_suffix(".json").read_text())
        record["template"] = templates.get("chat").record()
        del record["sha256"]  # of the file, which is written anew
        save_adapter(read_adapter(adapter), record, adapter)
        flags = ["--task", "exact", "--data", data, "--model", base, "--output", tmp_path / "o"]
        short = ["--limit", 5, "--tokens", 8]
        assert run(*flags, *short, "--peft_checkpoint", adapter)[0] == 0
        rows = read_lines(tmp_path / "o" / "answers.jsonl")
        prompts = [f"User: {row['question']}\n\nAssistant:" for row in QUESTIONS[:5]]
        assert [row["prompt"] for row in rows] == prompts
        ids = generate_batch(adapted, [list(prompt.encode()) for prompt in prompts], 8)
        assert [row["completion"] for row in rows] == list(map(BytesTokenizer().decode, ids))
        flags[-1] = tmp_path / "plain"
        assert run(*flags, *short)[0] == 0
        assert read_lines(tmp_path / "plain" / "answers.jsonl") != rows

    @pytest.mark.parametrize("share", [0.2, 0.5, 0.99])
    def test_torn_file_is_resumed_to_the_same(self, run, data, model, whole, tmp_path, share):
        """Wherever the writing was cut, in the middle of a line too."""
        before = contents(whole)
        torn = dict(before)
        torn["answers.jsonl"] = torn["answers.jsonl"][: int(share * len(torn["answers.jsonl"]))]
        del torn["summary.json"]
        for name, content in torn.items():
            (tmp_path / name).write_bytes(content)
        assert run(*flags(data, model, tmp_path))[0] == 0
        assert contents(tmp_path) == before


@pytest.mark.slow
def test_killed_at_three_points_and_resumed_is_the_same(model, tmp_path):
    data = write_lines(tmp_path / "many.jsonl", QUESTIONS * 4)

    def command(folder):
        longer = [*flags(data, model, tmp_path / folder), "--tokens", 100]
        return script_command("scripts/evaluate.py", *longer)

    run, environment = command("killed")
    rows = tmp_path / "killed" / "answers.jsonl"
    for wanted, further in ((1, 0), (129, 0.1), (257, 0)):  # seconds after so many rows
        process = subprocess.Popen(run, env=environment, stderr=subprocess.DEVNULL)
        while rows_in(rows) < wanted and process.poll() is None:
            time.sleep(0.001)
        time.sleep(further)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert wanted <= rows_in(rows) < 600
    assert subprocess.run(run, env=environment).returncode == 0
    run, environment = command("whole")
    assert subprocess.run(run, env=environment).returncode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def rows_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
