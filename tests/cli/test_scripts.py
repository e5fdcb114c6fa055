"""The small scripts, run as people run them."""

import json

import pytest
import torch
from helpers.support import (
    assert_one_error_line,
    run_script,
    rwkv_package_logits,
)

from finchtune.weights.base import load_model


@pytest.mark.slow
def test_init_model_writes_a_file_that_other_runtimes_load(tmp_path):
    path = tmp_path / "new.pth"
    words = "--n_layer 3 --n_embd 64 --vocab_size 300 --head_size_a 16".split()
    done = run_script("scripts/init_model.py", *words, "--output", path)
    assert done.returncode == 0, done.stderr
    model = load_model(path)
    assert (model.config.n_layer, model.config.head_size, model.config.dim_ffn) == (3, 16, 224)
    logits = rwkv_package_logits(path, [1, 2, 3])
    assert torch.allclose(model(torch.tensor([[1, 2, 3]]))[0][0], logits, atol=1e-4)


def test_init_model_refuses_impossible_sizes(tmp_path):
    words = "--n_layer 3 --n_embd 100 --vocab_size 300".split()
    done = run_script("scripts/init_model.py", *words, "--output", tmp_path / "new.pth")
    assert_one_error_line(done, "head size 64 does not divide n_embd 100", "--head_size_a")
    assert not list(tmp_path.iterdir())


def test_problems_are_right_seeded_and_held_out(tmp_path):
    words = "--skills add subtract total two_steps --train 300 --test 100 --seed 5".split()
    for name in ("a", "b"):
        done = run_script("scripts/make_problems.py", *words, "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
    train, test = ((tmp_path / "a" / f"{part}.jsonl").read_text() for part in ("train", "test"))
    assert train == (tmp_path / "b" / "train.jsonl").read_text()
    rows = [json.loads(line) for line in (train + test).splitlines()]
    assert len({row["question"] for row in rows}) == 400
    for row in rows:
        *steps, final = row["answer"].split(". ")
        for step in steps:
            left, right = step.split(" = ")
            assert eval(left) == int(right)
        assert final == f"The answer is {right}."
