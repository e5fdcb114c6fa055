"""`--smoke` of every table and figure of the paper, from its inputs to the files it writes."""

import importlib
import json
import os
import signal
import subprocess
from types import SimpleNamespace

import pytest
import torch
from helpers.paper import paper_inputs
from helpers.support import REPOSITORY, run_script, script_command

from finchtune.files import read_json

pytestmark = pytest.mark.slow

FEW = ("--limit", 2, "--tokens", 4)
STEPS = ("--", "--epoch_steps", 4, "--micro_bsz", 2, "--global_bsz", 2, "--ctx_len", 32)


@pytest.fixture
def inputs(tmp_path):
    return paper_inputs(tmp_path)


def words(inputs, output, *courses, tests=()):
    data = [f"{course}={inputs['gsm8k']}" for course in courses]
    given = ["--model", inputs["model"], "--data", *data, "--output", output, "--smoke"]
    files = [f"{name}={inputs[name]}" for name in tests]
    return [*given, *(["--test", *files] if files else [])]


def smoke(script, *arguments):
    """Run a script of scripts/paper; returns what it printed."""
    done = run_script(f"scripts/paper/{script}.py", *arguments, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def figures(output, name):
    """A table's values: label -> column -> one of each seed."""
    lines = read_json(output / f"{name}.json")["lines"]
    return {
        line["strategy"]: {key: figure["seeds"] for key, figure in line["figures"].items()}
        for line in lines
    }


def test_table_1(tmp_path):
    smoke("table1", "--smoke", "--output", tmp_path, "--seeds", 0, "--epochs", 1, "--limit", 64)
    found = figures(tmp_path, "table1")
    assert list(found) == ["LoRA", "PiSSA", "Bone"]
    assert all(len(scores) == 5 for scores in found.values())
    trained = {read_json(path)["training"]["trained"] for path in tmp_path.glob("*/result.json")}
    assert trained == {2 * 2 * 16 * 64}, "Bone's r is twice LoRA's: equal trainable parameters"


@pytest.mark.parametrize("peft", ["bone", "pissa"])
def test_a_training_of_table_1_goes_on_from_its_last_epoch(peft, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "paper"))
    glue, glue_data = (importlib.import_module(name) for name in ("glue", "glue_data"))
    model, data = glue_data.make_inputs(tmp_path, rows=64)
    task = glue_data.TASKS["mrpc"]
    train, dev = (glue_data.read_examples(data / "mrpc", task, s) for s in ("train", task.dev))
    given = SimpleNamespace(peft=peft, r=8, alpha=None, seed=0, lr=5e-3)

    def begun():
        torch.manual_seed(given.seed)
        loaded, tokenizer = glue.load(str(model), task)
        glue.adapt(loaded, given)
        return glue.Run(loaded, tokenizer, task, given, steps=8)

    whole, resumed = begun(), begun()
    whole.epoch(train, dev)
    whole.save(tmp_path / "epoch.pth")
    whole.epoch(train, dev)
    resumed.resume(tmp_path / "epoch.pth")
    resumed.epoch(train, dev)
    assert resumed.step == whole.step == 8
    assert resumed.scores == whole.scores
    for one, other in zip(resumed.parameters, whole.parameters, strict=True):
        assert torch.equal(one, other)


def test_table_2_with_all_its_tests(inputs, tmp_path):
    tests = ("gsm8k", "math", "humaneval", "mbpp", "mtbench")
    given = words(inputs, tmp_path / "out", "math", "code", "chat", tests=tests)
    text = smoke("table2", *given, *FEW, *STEPS)
    assert "Smoke run" in text
    found = figures(tmp_path / "out", "table2")
    assert list(found) == ["LoRA", "OLoRA", "PiSSA", "DoRA", "Bone"]
    results = [read_json(path) for path in (tmp_path / "out").glob("math-*/result.json")]
    trained = sorted({result["training"]["trained"] for result in results})
    assert len(trained) == 2, "DoRA alone trains more, a magnitude for each output"
    assert trained[1] - trained[0] == 5 * 64 + 2 * 64 + 224
    for scores in found.values():
        assert scores.pop("mtbench") == [], "nothing has judged the answers"
        assert all(len(values) == 1 for values in scores.values())
        assert scores.keys() == {"last", "gsm8k", "math", "loss", "humaneval", "mbpp"}
    assert (tmp_path / "out/table2.png").read_bytes().startswith(b"\x89PNG")


def test_tables_and_figures_share_their_cells(inputs, tmp_path):
    out = tmp_path / "out"
    given = words(inputs, out, "math", tests=("gsm8k",))
    ranks = smoke("table3", *given, *FEW, *STEPS)
    assert ranks.count("training done") == 4
    again = smoke("figure6", *given, *FEW, *STEPS)
    assert "done" not in again
    sides = smoke("table5", *given, *FEW, *STEPS)
    assert sides.count("training done") == 2
    curves = smoke("figure5", *given, *FEW, *STEPS)
    assert curves.count("training done") == 3, "Bone is table 3's, Bat table 5's"
    trained = {
        label: read_json(path)["training"]["trained"]
        for path in out.glob("*/result.json")
        for label in [path.parent.name.split("-")[1]]
        if "bone" not in label
    }
    assert len(set(trained.values())) == 1, "equal trainable parameters"
    assert len(list(out.glob("*.png"))) == 4


def test_a_table_of_an_rwkv7(tmp_path):
    given = words(paper_inputs(tmp_path, 7), tmp_path / "out", "math", tests=("gsm8k",))
    smoke("table5", *given, *FEW, *STEPS)
    results = [read_json(path) for path in (tmp_path / "out").glob("*/result.json")]
    trained = {result["training"]["trained"] for result in results}
    assert trained == {8 * (4 * 64 + 256 + 64)}, "six linears in a block"


def test_table_4_chooses_learning_rates_and_goes_on_where_it_was_stopped(inputs, tmp_path):
    out = tmp_path / "out"
    given = [*words(inputs, out, "math", tests=("gsm8k",)), *FEW, *STEPS]
    command, env = script_command("scripts/paper/table4.py", *given)
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as first:
        assert "training done" in first.stdout.readline()
        first.send_signal(signal.SIGTERM)
        rest, _ = first.communicate(timeout=300)
    assert first.returncode == 75
    assert "stopped; the same command continues from here" in rest
    finished = next(out.glob("*/result.json"))
    before = os.stat(finished.parent / "train" / "rwkv-0.pth").st_mtime_ns
    smoke("table4", *given)
    assert os.stat(finished.parent / "train" / "rwkv-0.pth").st_mtime_ns == before
    lines = read_json(out / "table4.json")["lines"]
    assert [line["strategy"] for line in lines] == ["Bone", "Bat"]
    for line in lines:
        rates = line["learning_rates"]["math"]
        assert len(rates["tried"]) == 2
        assert rates["tried"][f"{rates['chosen']:g}"] == min(rates["tried"].values())
        assert len(line["figures"]["loss"]["seeds"]) == 2
    cells = [read_json(path) for path in out.glob("*/result.json")]
    assert len(cells) == 6, "two rates with one seed, and the better with both"
    assert sum("loss" in cell for cell in cells) == 4, "the worse rate is not tested"
    assert not list(out.glob("*/train/checkpoints"))


def test_table_6(inputs, tmp_path):
    few = ("--", "--epoch_steps", 3, "--ctx_len", 32)
    smoke("table6", *words(inputs, tmp_path / "out", "math"), *few)
    found = figures(tmp_path / "out", "table6")
    assert len(found) == 6
    assert all(one["memory"][0] > 0 and one["speed"][0] > 0 for one in found.values())


def test_figure_1(inputs, tmp_path):
    given = ("--model", inputs["model"], "--data_file", inputs["gsm8k"], "--ranks", 2, 8)
    more = ("--biglora_r", 32, "--seeds", 0, 1, "--micro_bsz", 2, "--ctx_len", 16)
    out = smoke("figure1", *given, *more, "--output", tmp_path / "out", "--smoke")
    assert "| | r 2 | r 8 | any r |" in out
    assert (tmp_path / "out/figure1.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "out/figure1.json").read_text())["rows"]
    norms = {(row["method"], row["r"]): row["norms"] for row in rows}
    for full, frozen in zip(norms["full", None], norms["frozen_ft", None], strict=True):
        assert 0 < frozen < full, "part of the parameters, the same gradients"
    assert norms["bone", 2][0] != norms["bone", 2][1], "a batch for each seed"
    assert all(n < f for n, f in zip(norms["lora", 8], norms["full", None], strict=True))
