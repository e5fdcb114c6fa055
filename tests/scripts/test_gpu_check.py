"""The check for a GPU machine, tried on a CPU with tiny sizes, so that it runs the day it must."""

import json
import os
import signal
import subprocess
import sys

import pytest
from helpers.support import REPOSITORY, run_script

STEPS = REPOSITORY / "scripts" / "bench" / "gpu_steps.py"
REPORT = REPOSITORY / "scripts" / "bench" / "gpu_report.py"
BARE = """
import sys
for name in ("deepspeed", "tokenizers", "transformers", "sentencepiece"):
    sys.modules[name] = None
"""
RUNNABLE = (
    "build",
    "tests",
    "wkv6",
    "wkv7",
    "steps",
    "table6",
    "graphs",
    "profiles",
    "generation",
    "quantised",
)


@pytest.mark.slow
def test_every_stage_runs_and_is_reported(kernels, tmp_path):
    """Without DeepSpeed and tokenizers. Tests that need a GPU may be skipped."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}:$PYTHONPATH exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    subprocess.run(
        ["bash", REPOSITORY / "scripts" / "gpu_check.sh", "--dry", out],
        env={**os.environ, "PYTHON": str(python)},
        check=True,
    )
    found = json.loads((out / "gpu_check.json").read_text())
    assert {name: found[name]["status"] for name in RUNNABLE} == dict.fromkeys(RUNNABLE, "0")
    rows = found["table6"]["figures"]["rows"]
    assert [row["peft"] for row in rows] == ["lora", "bone", "bat"]
    assert all(row["tokens_per_s"] > 0 and 0 < row["products_share"] < 1 for row in rows)
    assert found["profiles"]["figures"]["rows"][1]["longest"]
    shapes = [(row["ctx_len"], row["graphs"]) for row in found["graphs"]["figures"]["rows"]]
    assert shapes == [(16, 0), (16, 1), (32, 0), (32, 1)]
    speeds = found["generation"]["figures"]["generation"]
    assert speeds["batch_tokens_per_s"] > 0
    assert speeds["nf4_one_tokens_per_s"] > 0
    table = (out / "gpu_check.md").read_text()
    assert "| 3b | bone | none | 1 | 1 | 1 x 16 |" in table
    assert "11,052 MB" in table


@pytest.mark.slow
def test_a_run_that_is_cut_off_leaves_the_results_of_its_stages(kernels, tmp_path):
    command = ["bash", REPOSITORY / "scripts" / "gpu_check.sh", "--dry", tmp_path]
    run = subprocess.Popen(
        command,
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert any(line.startswith("== tests") for line in run.stdout)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        run.stdout.close()
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert found["build"]["status"] == "0"
    assert "cpu: loaded" in found["build"]["said"]
    assert "| build | 0 |" in (tmp_path / "gpu_check.md").read_text()


def test_a_second_run_adds_its_stages_and_replaces_those_run_again(tmp_path):
    for run, stages in enumerate([{"build": "0", "tests": "124"}, {"tests": "0", "wkv6": "1"}]):
        logs = tmp_path / str(run)
        logs.mkdir()
        for name, status in stages.items():
            (logs / f"{name}.log").write_text(f"run {run}")
            with (logs / "stages.tsv").open("a") as table:
                table.write(f"{name}\t{status}\t3\n")
        assert run_script(REPORT, logs, tmp_path).returncode == 0
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {name: (x["status"], x["said"]) for name, x in found.items()} == {
        "build": ("0", "run 0"),
        "tests": ("0", "run 1"),
        "wkv6": ("1", "run 1"),
    }
    assert "| build | 0 | 3 |" in (tmp_path / "gpu_check.md").read_text()


def test_a_combination_that_fails_is_noted_and_the_next_one_runs(tmp_path):
    json_file = tmp_path / "steps.json"
    flags = "--dry --methods bone --quant bits none --shapes 1x16 --repeats 1 --json"
    run_script(STEPS, *flags.split(), json_file)
    rows = json.loads(json_file.read_text())["rows"]
    assert "quantised to nf4" in rows[0]["error"]
    assert rows[1]["launches"] > 0
    assert rows[1]["planned_mib"] > rows[1]["before_mib"]


def test_a_shape_that_is_none_is_refused():
    done = run_script(STEPS, "--dry", "--shapes", "4*512")
    assert done.returncode == 2
    assert "batch x length" in done.stderr
