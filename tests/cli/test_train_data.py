"""What train.py says of its data before the first step, and what it records of it."""

import json

import pytest
from helpers.additions import flags, make_folder
from helpers.support import assert_one_error_line, run_script, train

from finchtune.data import templates


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("train_data"))


def test_labels_that_are_lost_are_told_before_step_1(folder):
    rows = [{"text": f"User: {i}\n\nAssistant: {i}"} for i in range(6)]
    rows += [{"text": "nobody speaks"}, {"text": f"User: {'long ' * 20}\n\nAssistant: b"}]
    (folder / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "--loss_mask qa --peft bone --bone_r 8 --epoch_steps 1 --micro_bsz 4".split()
    done = train(*flags(folder, "lost", *words, data="turns.jsonl"))
    told = "2 of 8 documents train nothing: 1 have no trained token, 1 lose theirs to ctx_len 64"
    assert f"labels: {told}" in done.stdout
    assert "ctx_len: 120 keeps all trained tokens of 95% of the documents" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--sft_field", "question", "answer", "--ctx_len", "256"], "metamath"),
        (["--template", "alpaca"], "alpaca"),
    ],
)
def test_the_template_is_in_the_adapters_record(folder, words, name):
    more = "--peft bone --bone_r 8 --epoch_steps 1 --micro_bsz 4".split()
    train(*flags(folder, name, *more, *words))
    record = json.loads((folder / name / "rwkv-0.json").read_text())
    assert templates.from_record(record["template"]) == templates.get(name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data_file", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--val_file", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--data_type", "binidx", "--data_file", "nowhere"], "nowhere.bin: No such file"),
        (["--template", "alpacka"], "--template alpacka: did you mean alpaca?"),
    ],
)
def test_what_is_missing_is_told_before_the_model_is_built(folder, words, message):
    done = run_script("train.py", *flags(folder, "missing", *words))
    assert_one_error_line(done, message)
    assert "model:" not in done.stdout
    assert not (folder / "missing").exists()
